"""From records to packed batches: records → tokenise → pack → batch."""
