"""The default task: 9 topics of public-domain clip art."""
