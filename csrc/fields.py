"""Print the binding's view of latentrevise/kernels.h: the fields of each argument struct, which are listed there alone.

python fields.py KERNELS_H > fields.inc
"""

import re
import sys
from pathlib import Path

header = re.sub(r"/\*.*?\*/", "", Path(sys.argv[1]).read_text(encoding="utf-8"), flags=re.DOTALL)
for struct, body in re.findall(r"typedef struct (\w+_args) \{(.*?)\}", header, re.DOTALL):
    names = [name for name in re.findall(r"(\w+)\s*[,;]", body) if name not in ("size", "threads")]  # the binding's own
    print(f"template <typename Visitor>\nvoid visit(Visitor &&f, {struct} &a) {{")
    print(*(f'  f("{name}", a.{name});' for name in names), "}", sep="\n")
