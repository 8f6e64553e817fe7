"""Assets that work with no network: a data set, two teachers and the scripts that built them."""
