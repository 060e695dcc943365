"""Static pages of every feature, Neuronpedia's format, and the app."""
