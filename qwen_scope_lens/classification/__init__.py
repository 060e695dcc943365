"""Features as classifiers, in scikit-learn's shape."""
