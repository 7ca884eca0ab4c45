"""`paxo plan`: what a run needs and takes on chips that are not there."""
