"""Lower bounds that no plan can go below, with which every plan's gap is printed."""
