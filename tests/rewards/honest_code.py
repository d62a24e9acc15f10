"""Honest code, and tests that it passes: what can cross between the code and its tests."""

HONEST = {
    "set": (
        r"""
def f(x): return {x, 2}
""",
        r"""
assert f(1) == {1, 2}
""",
    ),
    "callback": (
        r"""
def apply(f, x): return f(x)
""",
        r"""
assert apply(lambda v: v + 1, 2) == 3
""",
    ),
    "callback nested": (
        r"""
def inc(x): return x + 1
def apply(f, x): return f(x)
""",
        r"""
assert apply(lambda v: inc(v) * 2, 2) == 6
""",
    ),
    "builtin arg": (
        r"""
def apply(f, x): return f(x)
""",
        r"""
assert apply(str, 2) == '2' and apply(len, 'ab') == 2
""",
    ),
    "class": (
        r"""
class Stack:
 def __init__(self): self.items = []
 def push(self, x): self.items.append(x)
 def pop(self): return self.items.pop()
 def __len__(self): return len(self.items)
 def __repr__(self): return 'Stack'
""",
        r"""
s = Stack()
s.push(1)
s.push(2)
assert len(s) == 2
assert s.pop() == 2
assert s.items == [1]
assert repr(s) == 'Stack' == str(s)
assert isinstance(s, Stack)
assert not isinstance(3, Stack)
""",
    ),
    "tree": (
        r"""
class Node:
 def __init__(self, v, l=None, r=None): self.v, self.left, self.right = v, l, r
def depth(n): return 0 if n is None else 1 + max(depth(n.left), depth(n.right))
""",
        r"""
n = Node(1, Node(2))
n.right = Node(3, Node(4))
assert depth(n) == 3
assert depth(None) == 0
assert n.right.left.v == 4
""",
    ),
    "exception": (
        r"""
def f(x):
 if x < 0: raise ValueError('negative')
 return x
""",
        r"""
try:
  f(-1)
except ValueError as e:
  assert str(e) == 'negative'
else:
  assert False
assert f(1) == 1
""",
    ),
    "own exception": (
        r"""
class Empty(KeyError): pass
class Very(Empty): pass
def f(): raise Very('x')
""",
        r"""
try: f()
except Empty as e: assert e.args == ('x',)
else: assert False
try: f()
except KeyError: pass
assert issubclass(Empty, KeyError)
""",
    ),
    "generator": (
        r"""
def gen(n):
 for i in range(n): yield i * i
""",
        r"""
assert list(gen(4)) == [0, 1, 4, 9]
g = gen(2)
assert next(g) == 0
assert next(g) == 1
try: next(g)
except StopIteration: pass
else: assert False
""",
    ),
    "infinite generator": (
        r"""
def gen():
 i = 0
 while True:
  yield i
  i += 1
""",
        r"""
import itertools
assert list(itertools.islice(gen(), 3)) == [0, 1, 2]
""",
    ),
    "in place": (
        r"""
def sort(a): a.sort()
def rot(m): m[:] = [list(r) for r in zip(*m[::-1])]
""",
        r"""
a = [3, 1]
assert sort(a) is None
assert a == [1, 3]
m = [[1, 2], [3, 4]]
rot(m)
assert m == [[3, 1], [4, 2]]
""",
    ),
    "counter": (
        r"""
from collections import Counter, defaultdict, OrderedDict, deque
def f(x): return Counter(x)
def g(): d = defaultdict(list); d[1].append(2); return d
def h(): return deque([1])
""",
        r"""
assert f('aab') == {'a': 2, 'b': 1}
assert f('aab') == Counter('aab')
assert f('aab').most_common(1) == [('a', 2)]
assert g() == {1: [2]}
assert h() == deque([1])
assert isinstance(f('a'), dict)
""",
    ),
    "namedtuple": (
        r"""
from collections import namedtuple
P = namedtuple('P', 'x y')
def f(): return P(1, 2)
""",
        r"""
assert f() == (1, 2)
assert f().x == 1
assert f() == P(1, 2)
x, y = f()
assert (x, y) == (1, 2)
assert f()[1] == 2
assert len(f()) == 2
assert (1, 2) == f()
""",
    ),
    "dataclass": (
        r"""
from dataclasses import dataclass
@dataclass
class P:
 x: int
 y: int = 2
def f(): return P(1)
""",
        r"""
assert f() == P(1, 2)
assert f() != P(2, 2)
assert f().y == 2
""",
    ),
    "enum": (
        r"""
import enum
class C(enum.Enum):
 R = 1
def f(): return C.R
""",
        r"""
assert f() == C.R
assert f().value == 1
assert f().name == 'R'
""",
    ),
    "intenum": (
        r"""
import enum
class C(enum.IntEnum):
 R = 1
def f(): return C.R
""",
        r"""
assert f() == 1
assert f() + 1 == 2
assert f() < 2
assert [5, 6][f()] == 6
""",
    ),
    "fraction decimal": (
        r"""
from fractions import Fraction
from decimal import Decimal
def f(): return Fraction(1, 2), Decimal('0.1')
""",
        r"""
from decimal import Decimal
assert f()[0] == 0.5 and f()[1] == Decimal('0.1') and f()[0] == Fraction(2, 4)
""",
    ),
    "dates": (
        r"""
import datetime
def f():
    day = datetime.date(2020, 1, 2)
    return day, datetime.datetime(2020, 1, 2, 3), datetime.timedelta(days=1)
""",
        r"""
day = datetime.date(2020, 1, 2)
assert f() == (day, datetime.datetime(2020, 1, 2, 3), datetime.timedelta(1))
""",
    ),
    "big": (
        r"""
def f(): return 2 ** 5000
""",
        r"""
assert f() == 1 << 5000
""",
    ),
    "floats": (
        r"""
def f(): return float('nan'), float('inf'), 0.1 + 0.2
""",
        r"""
import math
a, b, c = f()
assert math.isnan(a) and b == math.inf and abs(c - 0.3) < 1e-9
""",
    ),
    "bytes": (
        r"""
def f(): return b'\xff', bytearray(b'a'), 1j, range(3), None, ...
""",
        r"""
assert f() == (b'\xff', bytearray(b'a'), 1j, range(3), None, ...)
""",
    ),
    "unicode": (
        r"""
def f(): return 'é\ud800\n\u2028'
""",
        r"""
assert f() == 'é\ud800\n\u2028'
""",
    ),
    "kwargs": (
        r"""
def f(a, *, b=2, **k): return a, b, k
""",
        r"""
assert f(1, b=3, c=[4]) == (1, 3, {'c': [4]})
""",
    ),
    "closure": (
        r"""
def adder(n):
 def add(x): return x + n
 return add
""",
        r"""
assert adder(2)(3) == 5
assert adder(2).__name__ == 'add'
""",
    ),
    "decorator": (
        r"""
import functools
@functools.lru_cache
def fib(n): return n if n < 2 else fib(n-1) + fib(n-2)
""",
        r"""
assert fib(50) == 12586269025
assert fib.cache_info().hits > 0
""",
    ),
    "async": (
        r"""
import asyncio
async def f(x):
 await asyncio.sleep(0)
 return x + 1
""",
        r"""
import asyncio
assert asyncio.run(f(1)) == 2
async def main(): return await asyncio.gather(f(1), f(2))
assert asyncio.run(main()) == [2, 3]
""",
    ),
    "check": (
        r"""
def add(a, b): return a + b
""",
        r"""
def check(candidate):
    assert candidate(1, 2) == 3
    assert candidate('a', 'b') == 'ab'
check(add)
""",
    ),
    "iterator arg": (
        r"""
def total(xs): return sum(xs)
def first(it): return next(it)
""",
        r"""
assert total(x for x in range(4)) == 6
assert first(iter([7])) == 7
assert total({1: 2}.values()) == 2
""",
    ),
    "module": (
        r"""
import math
import re as regex
def area(r): return math.pi * r * r
""",
        r"""
assert math.isclose(area(1), 3.14159265, rel_tol=1e-6)
assert regex.match('a', 'ab')
""",
    ),
    "imported function": (
        r"""
from math import isclose, pi
from collections import Counter
def area(r): return pi * r
""",
        r"""
assert isclose(area(1), 3.14159265, rel_tol=1e-6)
""",
    ),
    "constants": (
        r"""
LIMIT = 3
NAMES = ['a']
""",
        r"""
assert LIMIT == 3 and NAMES == ['a']
""",
    ),
    "operators": (
        r"""
class V:
 def __init__(s, x): s.x = x
 def __add__(s, o): return V(s.x + o.x)
 def __eq__(s, o): return s.x == o.x
 def __lt__(s, o): return s.x < o.x
 def __neg__(s): return V(-s.x)
 def __getitem__(s, i): return s.x + i
 def __contains__(s, x): return x == s.x
 def __iter__(s): return iter([s.x])
 def __bool__(s): return s.x > 0
 def __enter__(s): return s
 def __exit__(s, *a): s.x = 0
 def __hash__(s): return 1
""",
        r"""
assert V(1) + V(2) == V(3)
assert V(1) < V(2)
assert (-V(1)).x == -1
assert V(1)[4] == 5
assert 1 in V(1)
assert bool(V(1)) and not V(0)
v = V(5)
with v as w: assert w.x == 5
assert v.x == 0
assert sorted([V(2), V(1)])[0] == V(1)
""",
    ),
    "recursion": (
        r"""
def f(n): return 0 if n == 0 else 1 + f(n - 1)
""",
        r"""
assert f(900) == 900
""",
    ),
    "stateful": (
        r"""
n = 0
def tick():
 global n
 n += 1
 return n
""",
        r"""
assert tick() == 1 and tick() == 2
""",
    ),
    "import solution": (
        r"""
def f(): return 1
""",
        r"""
import solution
from solution import f as g
assert solution.f() == g() == 1
""",
    ),
    "static": (
        r"""
class A:
 K = 3
 @staticmethod
 def f(x): return x
 @classmethod
 def make(cls): return cls()
 @property
 def p(self): return 4
""",
        r"""
assert A.K == 3 and A.f(1) == 1 and A.make().p == 4
assert isinstance(A.make(), A)
""",
    ),
    "main guard": (
        r"""
def f(): return 1
if __name__ == '__main__': raise SystemExit
""",
        r"""
assert f() == 1
""",
    ),
    "unittest": (
        r"""
def add(a, b): return a + b
""",
        r"""
import unittest
class T(unittest.TestCase):
 def test(self): self.assertEqual(add(1, 2), 3)
r = unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(T))
assert r.wasSuccessful()
""",
    ),
    "numpy": (
        r"""
import numpy as np
def f(x): return np.mean(x)
def g(x): return np.int64(3)
def h(): return np.array([1, 2])
""",
        r"""
assert f([1, 2]) == 1.5 and g(1) == 3
assert list(h()) == [1, 2]
assert h().tolist() == [1, 2]
""",
    ),
    "subprocess": (
        r"""
import subprocess, sys
def f():
    command = [sys.executable, '-c', 'print(1)']
    return subprocess.run(command, capture_output=True, text=True).stdout
""",
        r"""
assert f() == '1\n'
""",
    ),
    "threads": (
        r"""
import threading
def f():
 x = []
 t = threading.Thread(target=x.append, args=(1,)); t.start(); t.join(); return x
""",
        r"""
assert f() == [1]
""",
    ),
    "random": (
        r"""
import random
def f():
 random.seed(0)
 return random.random()
""",
        r"""
import random
random.seed(0)
assert f() == random.random()
""",
    ),
    "printing": (
        r"""
def f(): print('hi')
""",
        r"""
f()
""",
    ),
}
