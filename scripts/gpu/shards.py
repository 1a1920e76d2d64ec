"""How the parts of tensor-parallel ranks are cut; plain Python, and tried without PyTorch."""


def cut(units, world):
    """(start, end) of each rank's part; the first have one more where they cannot be equal."""
    bounds = [0]
    for rank in range(world):
        bounds.append(bounds[-1] + units // world + (rank < units % world))
    return list(zip(bounds, bounds[1:]))
