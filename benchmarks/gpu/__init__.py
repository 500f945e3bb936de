"""Everything that only a GPU can tell, in one command: is it right, how fast is it, and against which floor.

    python -m benchmarks.gpu                    # one GPU; under 8 minutes
    python -m benchmarks.gpu --rehearse         # no GPU: the same code at small shapes, and its programs compiled for one

A run is a list of sections, each a process of its own, because a wrong address in one kernel ends every later use of the
device by that process. The parent never touches the device; it hands out the time, collects rows and writes the
result after each section. Sections do their device work through `lab.Lab`, which can also stop at finding out which
programs there are: that is how the rehearsal compiles exactly what a real run runs.
"""
