// Entry points of grammars over tokens: the trie of a vocabulary, the masks of an automaton, and where the running
// sequences are. Arrays come as integers (addresses), as in bind.cpp; what has to live longer is copied.
#include "bind_grammar.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "grammar/masks.h"
#include "grammar/slots.h"
#include "grammar/trie.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace sg {
namespace {

template <class T>
T* at(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

std::vector<std::string_view> views_of(const nb::list& tokens) {
  std::vector<std::string_view> views;
  views.reserve(tokens.size());
  for (const nb::handle token : tokens) {
    const nb::bytes bytes = nb::cast<nb::bytes>(token);
    views.emplace_back(bytes.c_str(), bytes.size());  // the list keeps the objects
  }
  return views;
}

int32_t checked_state(const MaskTable& table, int32_t state) {
  if (state >= 0 && state < table.num_states()) return state;
  throw std::out_of_range("state: expected 0 to " + std::to_string(table.num_states() - 1) + ", got " +
                          std::to_string(state));
}

nb::object state_or_none(int32_t state) {
  if (state == MaskTable::kNone) return nb::none();
  return nb::int_(state);
}

nb::tuple tuple_of(const std::vector<int32_t>& ids) {
  nb::list list;
  for (const int32_t id : ids) list.append(id);
  return nb::tuple(list);
}

void fill_row(const MaskTable& table, int32_t state, uint32_t* words) {
  const RowPtr row = table.row(state);
  if (row->kind == MaskRow::Kind::kDense) {
    std::copy(row->words.begin(), row->words.end(), words);
    return;
  }
  std::fill(words, words + mask_words(table.vocab()), 0u);
  for (const int32_t id : row->ids) words[id / 32] |= 1u << (id % 32);
}

const char* kind_name(MaskRow::Kind kind) {
  return kind == MaskRow::Kind::kForced ? "forced" : kind == MaskRow::Kind::kSparse ? "sparse" : "dense";
}

void bind_trie_and_cache(nb::module_& m) {
  nb::class_<TokenTrie>(m, "TokenTrie", "The tokens of a vocabulary as a trie of bytes.")
      .def(
          "__init__",
          [](TokenTrie* self, const nb::list& tokens) {
            const std::vector<std::string_view> views = views_of(tokens);
            new (self) TokenTrie(views);
          },
          "tokens"_a, "tokens: bytes by id; b\"\" is never matched.")
      .def_prop_ro("vocab_size", &TokenTrie::vocab)
      .def_prop_ro("num_nodes", &TokenTrie::num_nodes)
      .def_prop_ro("num_bytes", &TokenTrie::bytes);
  nb::class_<MaskCache>(m, "MaskCache", "Rows of any number of tables; those that were not used for longest go first.")
      .def(nb::init<int64_t>(), "max_bytes"_a)
      .def_prop_ro("num_bytes", &MaskCache::bytes)
      .def_prop_ro("num_rows", &MaskCache::num_rows);
}

void bind_table(nb::module_& m) {
  nb::class_<MaskTable>(m, "MaskTable", "Which tokens an automaton over bytes allows in each of its states.")
      .def(
          "__init__",
          [](MaskTable* self, std::shared_ptr<TokenTrie> trie, uint64_t classes, uint64_t transitions,
             uint64_t accepting, int num_states, int num_classes, std::vector<int32_t> stop_ids,
             std::shared_ptr<MaskCache> cache) {
            Automaton automaton;
            automaton.classes.assign(at<uint8_t>(classes), at<uint8_t>(classes) + 256);
            const int32_t* targets = at<int32_t>(transitions);
            automaton.transitions.assign(targets, targets + int64_t(num_states) * num_classes);
            automaton.accepting.assign(at<uint8_t>(accepting), at<uint8_t>(accepting) + num_states);
            automaton.num_classes = num_classes;
            nb::gil_scoped_release release;
            new (self) MaskTable(std::move(trie), std::move(automaton), std::move(stop_ids), std::move(cache));
          },
          "trie"_a, "classes"_a, "transitions"_a, "accepting"_a, "num_states"_a, "num_classes"_a, "stop_ids"_a,
          "cache"_a,
          "classes uint8 [256], transitions int32 [num_states, num_classes] (-1: none), accepting uint8 [num_states];\n"
          "state 0 is the start, and every state reaches an accepting one.")
      .def_prop_ro("num_states", &MaskTable::num_states)
      .def_prop_ro("vocab_size", &MaskTable::vocab)
      .def_prop_ro("num_bytes", &MaskTable::bytes, "Of the table itself, its rows aside.")
      .def_prop_ro("is_spellable", &MaskTable::is_spellable, "Whether the tokens can spell any whole output.")
      .def(
          "next_state",
          [](const MaskTable& self, int32_t state, int32_t token) {
            return state_or_none(self.next_token(checked_state(self, state), token));
          },
          "state"_a, "token"_a, nb::sig("def next_state(self, state: int, token: int) -> int | None"),
          "The state after a token that is no stop id; None where it is not allowed.")
      .def(
          "next_bytes",
          [](const MaskTable& self, int32_t state, const nb::bytes& text) {
            return state_or_none(self.next_bytes(checked_state(self, state), {text.c_str(), text.size()}));
          },
          "state"_a, "text"_a, nb::sig("def next_bytes(self, state: int, text: bytes) -> int | None"))
      .def("is_stop", &MaskTable::is_stop, "token"_a)
      .def(
          "may_stop", [](const MaskTable& self, int32_t s) { return self.may_stop(checked_state(self, s)); }, "state"_a)
      .def(
          "must_stop", [](const MaskTable& self, int32_t s) { return self.must_stop(checked_state(self, s)); },
          "state"_a)
      .def(
          "row_kind",
          [](const MaskTable& self, int32_t s) {
            return std::string(kind_name(self.row(checked_state(self, s))->kind));
          },
          "state"_a, "\"forced\" | \"sparse\" | \"dense\"; derives the row.")
      .def(
          "fill_row",
          [](const MaskTable& self, int32_t state, uint64_t words) {
            checked_state(self, state);
            nb::gil_scoped_release release;
            fill_row(self, state, at<uint32_t>(words));
          },
          "state"_a, "words"_a, "The row as bits: uint32 [ceil(vocab_size / 32)].")
      .def(
          "forced_run",
          [](const MaskTable& self, int32_t state, int32_t limit) {
            return tuple_of(self.forced_run(checked_state(self, state), limit));
          },
          "state"_a, "limit"_a, nb::sig("def forced_run(self, state: int, limit: int) -> tuple[int, ...]"),
          "The tokens that follow without a choice.")
      .def(
          "forced_bytes",
          [](const MaskTable& self, int32_t state, int32_t limit) {
            const std::string run = self.forced_bytes(checked_state(self, state), limit);
            return nb::bytes(run.data(), run.size());
          },
          "state"_a, "limit"_a, "The bytes that follow without a choice.")
      .def(
          "likely_run",
          [](const MaskTable& self, int32_t state, int32_t limit) {
            return tuple_of(self.likely_run(checked_state(self, state), limit));
          },
          "state"_a, "limit"_a, nb::sig("def likely_run(self, state: int, limit: int) -> tuple[int, ...]"),
          "Tokens that probably follow: the text does, though not how it is cut.");
}

nb::tuple taken_tuple(const GrammarSlots::Taken& taken) {
  nb::list turns;
  for (const GrammarSlots::Turn& turn : taken.turns) {
    turns.append(nb::make_tuple(turn.index, tuple_of(turn.forced), turn.ends, tuple_of(turn.likely)));
  }
  nb::list cuts;
  for (const GrammarSlots::Cut& cut : taken.cuts) cuts.append(nb::make_tuple(cut.index, cut.num_kept));
  return nb::make_tuple(turns, tuple_of(taken.faults), cuts);
}

void bind_slots(nb::module_& m) {
  nb::class_<GrammarSlots>(m, "GrammarSlots",
                           "Where each running sequence is in its grammar; see csrc/grammar/slots.h.")
      .def(nb::init<int32_t>(), "num_slots"_a)
      .def(
          "begin",
          [](GrammarSlots& self, int32_t slot, std::shared_ptr<MaskTable> table, int32_t num_prompt,
             const std::vector<int32_t>& output, std::vector<int32_t> begins_after, std::vector<int32_t> opens_with,
             bool is_forced, bool repeats, std::vector<int32_t> held_ids, bool wants_runs) {
            GrammarUse use{
                std::move(begins_after), std::move(opens_with), is_forced, repeats, std::move(held_ids), wants_runs};
            return self.begin(slot, std::move(table), std::move(use), num_prompt, output);
          },
          "slot"_a, "table"_a, "num_prompt"_a, "output"_a, "begins_after"_a = std::vector<int32_t>{},
          "opens_with"_a = std::vector<int32_t>{}, "is_forced"_a = false, "repeats"_a = false,
          "held_ids"_a = std::vector<int32_t>{}, "wants_runs"_a = true,
          "A sequence takes the slot, with its output so far; False if that is not allowed, and then it has failed.")
      .def("drop", &GrammarSlots::drop, "slot"_a, "A sequence without a grammar takes the slot.")
      .def("propose", &GrammarSlots::propose, "slot"_a, "position"_a, "ids"_a,
           "Tokens to verify, the first at `position`; those that were taken before are passed over.")
      .def(
          "take",
          [](GrammarSlots& self, uint64_t rows, int32_t num_rows, uint64_t drawn, uint64_t places, uint64_t tokens,
             int64_t stride) {
            return taken_tuple(self.take(at<SampleRow>(rows), num_rows, at<int32_t>(drawn), at<int32_t>(places),
                                         at<int32_t>(tokens), stride));
          },
          "rows"_a, "num_rows"_a, "drawn"_a, "places"_a, "tokens"_a, "stride"_a,
          nb::sig("def take(self, rows: int, num_rows: int, drawn: int, places: int, tokens: int, stride: int) -> "
                  "tuple[list[tuple[int, tuple[int, ...], bool, tuple[int, ...]]], tuple[int, ...], "
                  "list[tuple[int, int]]]"),
          "Take drawn int32 [num_rows] of SAMPLE_ROW rows; places int32 [num_rows] of each row's sequence in the "
          "plan,\n"
          "or 0: row by row. Returns turns (place, forced ids, whether it ends, likely ids), the places that failed, "
          "and\n"
          "cuts (place, how many of its rows count).")
      .def(
          "fill",
          [](const GrammarSlots& self, int32_t slot, int32_t position, uint64_t words) {
            nb::gil_scoped_release release;
            return self.fill(slot, position, at<uint32_t>(words));
          },
          "slot"_a, "position"_a, "words"_a,
          "What the token after `position` may be, as bits; False where it may be any, and nothing is written.")
      .def("num_known", &GrammarSlots::num_known, "slot"_a, "Output tokens that were taken or proposed.");
}

}  // namespace

void bind_grammar(nb::module_& m) {
  bind_trie_and_cache(m);
  bind_table(m);
  bind_slots(m);
}

}  // namespace sg
