"""Where a student's cosine with its teacher is lost, and what a teacher's own is at a noise nearby: ours, to read
Table 1 by.

The Jacobian of a few-step map is the product of its steps', each at the state where the step begins. It may be another
than the teacher's because steps respond otherwise at the teacher's states, or because the student's states are others
and the teacher itself would respond otherwise there.
"""

from itertools import pairwise

from ..backbones import Backbone
from ..tangents import Tangents
from .geometry import compare, endpoint, tangents


def chain(backbone: Backbone, student, teacher: Tangents, batch: int) -> dict[str, list[list[float]]]:
    """Cosines with the teacher's response after each of the student's K steps, K lists of N.

    `step`: of that step alone, at the teacher's state and along the teacher's response there; `path`: of all steps so
    far, each at the teacher's state; `own`: each at the student's own, so that the last is Table 1's of the endpoint.
    `teacher`: its paths at the student's K + 1 times.
    """
    out: dict[str, list[list[float]]] = {"step": [], "path": [], "own": []}
    x, path, own = teacher.z, teacher.v, teacher.v
    for k, (t, s) in enumerate(pairwise(backbone.times(teacher.steps).to(teacher.z.device))):
        def moved(x, v, t=t, s=s):
            def of(cond):
                return lambda y: backbone.step(student, y, t.expand(len(y)), s.expand(len(y)), cond)

            return tangents(of, x, v, teacher.cond, batch)

        at, its = teacher.states[:, k], teacher.responses[:, k]
        (_, alone), (_, path), (x, own) = moved(at, its), moved(at, path), moved(x, own)
        for name, found in (("step", alone), ("path", path), ("own", own)):
            out[name].append(compare(found, teacher.responses[:, k + 1])["cos"].tolist())
    return out


def nearby(
    backbone: Backbone, test: Tangents, size: float, steps: int, cfg: float, batch: int, seed: int
) -> dict[str, list[float]]:
    """The teacher against itself at noises nearby, `√(1 − size²) z + size w`, along the same `v`: `cos` of responses
    and relative squared `value` error, (N,) each. `size` in (0, 1); `seed`: of w."""
    z = (1 - size**2) ** 0.5 * test.z + size * backbone.noise(len(test), seed)
    y, jv = tangents(lambda c: endpoint(backbone, backbone.network, c, steps, cfg), z, test.v, test.cond, batch)
    return {"cos": compare(jv, test.jv)["cos"].tolist(), "value": compare(y, test.x0)["relative"].tolist()}
