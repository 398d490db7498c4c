"""The pipeline as a short graph in the notation of Mermaid, which GitHub and many editors draw.

Reads:  dvc.yaml and params.yaml, by DVC
Prints: a line for each arrow from a stage to one that needs it. An arrow that only repeats what others say together is
        left out. A stage that runs for each seed or evaluator is one node.
Method: the smallest graph with the same paths (Aho, Garey and Ullman 1972), by networkx
Usage:  make dag, or python -m stages.dag
"""

import networkx as nx
from dvc.repo import Repo

from fairway.runtime.errors import run_stage


def main() -> None:
    """Print the graph in the order in which stages run."""
    with Repo() as repo:
        # DVC's arrows lead from a stage to what it needs.
        needs = [(_name(stage), _name(needed)) for stage, needed in repo.index.graph.edges]
    arrows = nx.transitive_reduction(nx.DiGraph((needed, stage) for stage, needed in needs))
    print("flowchart LR")
    for stage in nx.lexicographical_topological_sort(arrows):
        for behind in sorted(arrows[stage]):
            print(f"    {stage} --> {behind}")


def _name(stage: object) -> str:
    """The name without the seed and the evaluator."""
    name: str = stage.addressing  # type: ignore[attr-defined]
    return name.partition("@")[0]


if __name__ == "__main__":
    run_stage(main)
