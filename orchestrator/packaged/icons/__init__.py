"""A labelled task of icons: validated and tested on a designer whom no training image comes from."""
