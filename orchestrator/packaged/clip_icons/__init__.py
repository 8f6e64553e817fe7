"""A small vision-language teacher for icons: weights, data, model card and the scripts that built them."""
