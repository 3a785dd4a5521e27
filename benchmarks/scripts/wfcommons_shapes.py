"""Runs in the interpreter that has wfcommons: prints {name: {"deps", "seconds"}} for about argv[1] tasks."""

import json
import logging
import random
import sys

import numpy
from wfcommons import WorkflowGenerator
from wfcommons.wfchef.recipes import EpigenomicsRecipe, GenomeRecipe, MontageRecipe

logging.disable(logging.CRITICAL)


def numbered(workflow):
    """Dependencies by number in topological order, and run times."""
    tasks = {name: task.runtime for name, task in workflow.tasks.items()}
    before = {name: [] for name in tasks}
    after = {name: [] for name in tasks}
    for left, right in workflow.edges:
        before[right].append(left)
        after[left].append(right)
    waiting = {name: len(deps) for name, deps in before.items()}
    order = [name for name, count in waiting.items() if count == 0]
    for name in order:
        for following in after[name]:
            waiting[following] -= 1
            if waiting[following] == 0:
                order.append(following)
    number = {name: place for place, name in enumerate(order)}
    return {
        "deps": [[number[other] for other in before[name]] for name in order],
        "seconds": [max(0.001, float(tasks[name])) for name in order],
    }


def main(size, seed):
    """Three recipes, seeded."""
    random.seed(seed)
    numpy.random.seed(seed)
    recipes = {"Montage": MontageRecipe, "Epigenomics": EpigenomicsRecipe, "1000Genome": GenomeRecipe}
    print(
        json.dumps(
            {
                name: numbered(WorkflowGenerator(recipe.from_num_tasks(size)).build_workflow())
                for name, recipe in recipes.items()
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
