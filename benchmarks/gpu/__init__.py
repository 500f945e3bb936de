"""Everything that only a GPU can tell, in one command: is it right, how fast is it, and how close to what is possible.

    python -m benchmarks.gpu                    # one GPU; under 8 minutes
    python -m benchmarks.gpu --rehearse         # no GPU: the same code at small shapes, and its programs compiled for one

A run is a list of sections, each in a separate process, because a wrong address in one kernel makes the device unusable for the
rest of that process. The parent never touches the device; it hands out the time, collects rows and writes the result after each
section. Sections do their device work through `lab.Lab`, which can also merely list the programs: that is how the rehearsal
compiles exactly what a real run executes.
"""
