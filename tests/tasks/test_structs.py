"""No thread meets a struct that msgspec does not know."""

import subprocess
import sys
import textwrap

#: imports all of nograd, then prints every struct that some module decodes into and msgspec has not looked at
LOOK = """
    import ast, gc, importlib, inspect, pkgutil
    import msgspec, nograd
    import nograd.tasks, nograd.producer, nograd.workers

    def structs_of(node, module):
        found = eval(compile(ast.Expression(node), module.__file__, "eval"), vars(module))
        members = getattr(found, "__args__", (found,))
        return [each for each in members if isinstance(each, type) and issubclass(each, msgspec.Struct)]

    def decoded(call):
        name = ast.unparse(call.func)
        if name == "msgspec.convert":
            yield call.args[1]
        elif name.startswith("msgspec.") and name.endswith(".Decoder"):
            yield from call.args[:1]
        elif name.startswith("msgspec.") and name.endswith(".decode"):
            yield from (word.value for word in call.keywords if word.arg == "type")

    seen = set()
    for package in (nograd.tasks, nograd.producer, nograd.workers):
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if found.name.endswith("__main__") or found.name == "nograd.tasks.structs":
                continue
            module = importlib.import_module(found.name)
            for node in ast.walk(ast.parse(inspect.getsource(module))):
                if isinstance(node, ast.Call):
                    for what in decoded(node):
                        seen.update(structs_of(what, module))
    assert len(seen) > 10, seen
    unknown = [each for each in seen if not any(type(part).__name__ == "StructInfo" for part in gc.get_referents(each))]
    print(*sorted(f"{each.__module__}.{each.__qualname__}" for each in unknown))
"""


def test_what_any_module_decodes_into_is_known_to_msgspec_when_it_has_been_imported():
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(LOOK)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
