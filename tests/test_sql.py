"""What the normal form of a query keeps and drops, and the share of matches."""

import gzip
import json
import os

import pytest

from spec_stream import sql

SAME = [
  ("SELECT Name FROM Singer", "select  name\nfrom singer ; ;"),
  ("SELECT a FROM t -- all of it", "SELECT /* b */ a FROM t"),
  ("SELECT a FROM t; -- that is it", "SELECT a FROM t"),
  ("SELECT Count( * ) FROM t", "SELECT COUNT(*) FROM t"),
  ("SELECT a FROM t GROUP \n BY a", "SELECT a FROM t group by a"),
  ("SELECT [City], `b` FROM t", "SELECT city, B FROM t"),
  ("SELECT [a B] FROM t", "SELECT `A b` FROM t"),
  ('SELECT "T".a FROM "T"', "SELECT t.a FROM t"),
  ('SELECT a AS "X" FROM t', "SELECT a AS x FROM t"),
  ('SELECT a FROM t WHERE b = "Ann"', "SELECT a FROM t WHERE b = 'Ann'"),
  ("SELECT a FROM t WHERE b = 'it''s'", 'SELECT a FROM t WHERE b = "it\'s"'),
  (
    'SELECT a FROM t WHERE b = "6"" or so"',
    "SELECT a FROM t WHERE b = '6\" or so'",
  ),
  ("SELECT a FROM t WHERE b != 1", "SELECT a FROM t WHERE b <> 1"),
  ("SELECT a FROM t WHERE b == 1", "SELECT a FROM t WHERE b = 1"),
]
OTHER = [
  ('SELECT a FROM t WHERE b = "Ann"', 'SELECT a FROM t WHERE b = "ann"'),
  ('SELECT a FROM t WHERE b = "a b"', 'SELECT a FROM t WHERE b = "a  b"'),
  ('SELECT a FROM t WHERE b = "c"', "SELECT a FROM t WHERE b = c"),
  ('SELECT a FROM t WHERE b = "c"', "SELECT a FROM t WHERE b = `c`"),
  ("SELECT a FROM t WHERE b = 1", "SELECT a FROM t WHERE b = '1'"),
  ("SELECT a FROM t WHERE b = 1", "SELECT a FROM t WHERE b = 1.0"),
  (
    "SELECT a FROM t WHERE b = 1 AND c = 2",
    "SELECT a FROM t WHERE c = 2 AND b = 1",
  ),
  ("SELECT a, b FROM t", "SELECT b, a FROM t"),
  ("SELECT a FROM t", "SELECT a, FROM t"),  # sqlglot reads over the comma
  ("SELECT a FROM t AS x", "SELECT a FROM t x"),
  ("SELECT a FROM t JOIN u", "SELECT a FROM t INNER JOIN u"),
  ("SELECT a FROM t WHERE b = x'ab'", "SELECT a FROM t WHERE b = 'ab'"),
  ("SELECT a FROM t WHERE b = x'ab'", "SELECT a FROM t WHERE b = ab"),
  ("SELECT a FROM t WHERE b = ';'", "SELECT a FROM t WHERE b = ''"),
  ("SELECT a FROM t WHERE b = 'x;'", "SELECT a FROM t WHERE b = 'x'"),
  ("SELECT a ';'", "SELECT a"),
  (
    "SELECT a FROM t WHERE b IS DISTINCT FROM 'Paris'",
    "SELECT a FROM t WHERE b IS DISTINCT FROM 'paris'",
  ),
  ("SELECT TRIM(a FROM 'Bb') FROM t", "SELECT TRIM(a FROM 'bb') FROM t"),
]
NO_QUERY = [
  "",
  ";",
  "-- only this",
  "red and blue",
  "red",  # an expression, but no query
  "EXPLAIN SELECT a FROM t",
  "SELECT a FROM t; SELECT b FROM t",
  "SELECT a FROM (t",
  "SELECT 'unclosed",
  "SELECT " + "(" * 5000,
  "\x00",
]


@pytest.mark.parametrize("one, other", SAME)
def test_one_query_in_two_spellings(one, other):
  assert sql.normalise(one) is not None
  assert sql.normalise(one) == sql.normalise(other)


@pytest.mark.parametrize("one, other", OTHER)
def test_what_is_not_normalised(one, other):
  assert sql.normalise(one) is not None and sql.normalise(other) is not None
  assert sql.normalise(one) != sql.normalise(other)


@pytest.mark.parametrize("text", NO_QUERY)
def test_what_is_no_query_is_none_and_silent(text, capfd, caplog):
  assert sql.normalise(text) is None
  assert capfd.readouterr() == ("", "") and not caplog.records


def test_the_normal_form_is_one_of_its_own():
  for text in [x for pair in SAME for x in pair]:
    form = sql.normalise(text)
    assert sql.normalise(form) == form


def test_matches_are_counted_by_hand():
  outputs = [
    "select a from t",  # the second reference
    "SELECT b FROM t",  # none
    "no query  at\nall",  # the folded text of a reference that is none either
    "No query at all",  # letters count in a folded text
    "SELECT  a FROM t",  # of a query against no query: folded texts
  ]
  references = [
    ["SELECT b FROM t", "SELECT A FROM T"],
    ["SELECT a FROM t"],
    ["no query at all"],
    ["no query at all"],
    ["nonsense", "SELECT a FROM t WHERE"],
  ]
  assert sql.exact_match(outputs, references) == {
    "exact_match": pytest.approx(40),
    "unparsed": 2,
    "unparsed_references": 4,
  }


@pytest.mark.skipif(
  "SPEC_STREAM_DATA" not in os.environ, reason="no SPEC_STREAM_DATA"
)
def test_real_answers_are_queries():
  folder = os.path.join(
    os.environ["SPEC_STREAM_DATA"], "sql_create_context_rederived"
  )
  with gzip.open(f"{folder}/validation.jsonl.gz", "rt") as file:
    texts = [json.loads(line)["answer"] for line in file][::9]
  known = [[text.replace("SELECT", "select").upper()] for text in texts]
  same = sql.exact_match(texts, [[f" {text} ;"] for text in texts])
  assert same["exact_match"] == 100
  assert same["unparsed"] == same["unparsed_references"] == 0
  # In capitals, literals differ: all but the queries without letters in one.
  assert 0 < sql.exact_match(texts, known)["exact_match"] < 50
