"""Scripts and manifests for batch systems and clusters, and the hostfiles that they read."""
