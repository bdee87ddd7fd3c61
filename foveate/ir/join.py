"""Temporary."""
def join(program, graph, inputs=False):
    return graph
