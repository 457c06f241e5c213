// Masks against walking every token byte by byte, readers of a cache that is too small, and sequences that go back.
#include <algorithm>
#include <memory>
#include <thread>

#include "check.h"
#include "common/program.h"
#include "grammar/masks.h"
#include "grammar/slots.h"
#include "grammar/trie.h"

namespace sg::test {

namespace {

// Random pieces over a few bytes, some of which begin characters; all single bytes are tokens.
std::vector<std::string> random_tokens(Random& random, int count) {
  const std::string bytes("ab\"\\ \n\xc3\xa9\xe4\xbd\xa0\xf0\x9f\x99\x82\xc2\x80z1");
  std::vector<std::string> tokens;
  for (int b = 0; b < 256; b++) tokens.emplace_back(1, char(b));
  tokens.emplace_back();  // a stop id
  while (int(tokens.size()) < count) {
    std::string token;
    for (int n = random.below(9); n > 0; n--) token += bytes[size_t(random.below(int(bytes.size())))];
    tokens.push_back(token);
  }
  return tokens;
}

constexpr int32_t kStop = 256;

std::shared_ptr<const TokenTrie> trie_of(const std::vector<std::string>& tokens) {
  return std::make_shared<const TokenTrie>(std::vector<std::string_view>(tokens.begin(), tokens.end()));
}

// Every state reaches an accepting one over byte 'a', which counts down.
Automaton random_automaton(Random& random, int states) {
  Automaton a;
  a.num_classes = 12;
  for (int b = 0; b < 256; b++) a.classes.push_back(uint8_t(b == 'a' ? 0 : 1 + random.below(11)));
  for (int s = 0; s < states; s++) {
    const bool is_text = random.below(3) == 0;
    for (int c = 0; c < a.num_classes; c++) {
      const int32_t target = is_text ? s : random.below(states);
      a.transitions.push_back(c == 0 ? std::max(0, s - 1) : random.below(3) == 0 ? Automaton::kNone : target);
    }
    a.accepting.push_back(s == 0 || random.below(4) == 0);
  }
  return a;
}

// A text of UTF-8 between quotes: 0 start, 1 within, 2 escaped, 3 end, 4 to 6 within a character.
Automaton text_automaton() {
  Automaton a;
  a.num_classes = 256;
  for (int b = 0; b < 256; b++) a.classes.push_back(uint8_t(b));
  a.transitions.assign(size_t(11 * 256), Automaton::kNone);
  a.accepting.assign(11, 0);
  a.accepting[3] = 1;
  const auto set = [&](int state, int low, int high, int target) {
    for (int b = low; b <= high; b++) a.transitions[size_t(state * 256 + b)] = target;
  };
  set(0, '"', '"', 1);
  set(1, ' ', 0x7e, 1);
  set(1, '\\', '\\', 2);
  set(1, '"', '"', 3);
  for (const char c : {'"', '\\', 'n'}) set(2, c, c, 1);
  set(1, 0xc2, 0xdf, 4);
  set(1, 0xe0, 0xe0, 7), set(1, 0xe1, 0xef, 5), set(1, 0xed, 0xed, 8);
  set(1, 0xf0, 0xf0, 9), set(1, 0xf1, 0xf3, 6), set(1, 0xf4, 0xf4, 10);
  set(4, 0x80, 0xbf, 1), set(5, 0x80, 0xbf, 4), set(6, 0x80, 0xbf, 5);
  set(7, 0xa0, 0xbf, 4), set(8, 0x80, 0x9f, 4), set(9, 0x90, 0xbf, 5), set(10, 0x80, 0x8f, 5);
  return a;
}

int32_t walked(const Automaton& a, int32_t state, const std::string& text) {
  for (const char c : text) {
    if (state != Automaton::kNone) state = a.next(state, uint8_t(c));
  }
  return state;
}

std::vector<uint8_t> expected_row(const Automaton& a, int32_t state, const std::vector<std::string>& tokens) {
  std::vector<uint8_t> row;
  for (size_t id = 0; id < tokens.size(); id++) {
    const bool is_allowed = !tokens[id].empty() && walked(a, state, tokens[id]) != Automaton::kNone;
    row.push_back(int32_t(id) == kStop ? a.accepting[size_t(state)] : is_allowed);
  }
  return row;
}

std::vector<uint8_t> bits_of_row(const MaskRow& row, int32_t vocab) {
  std::vector<uint8_t> bits(size_t(vocab), 0);
  for (const int32_t id : row.ids) bits[size_t(id)] = 1;
  for (size_t id = 0; id < bits.size() && !row.words.empty(); id++) bits[id] = row.words[id / 32] >> (id % 32) & 1;
  return bits;
}

void check_table(const MaskTable& table, const Automaton& a, const std::vector<std::string>& tokens) {
  for (int32_t state = 0; state < table.num_states(); state++) {
    const RowPtr row = table.row(state);
    const std::vector<uint8_t> expected = expected_row(a, state, tokens);
    expect(bits_of_row(*row, table.vocab()) == expected, "row of state " + std::to_string(state));
    const auto count = std::count(expected.begin(), expected.end(), 1);
    expect((row->kind == MaskRow::Kind::kForced) == (count == 1), "forced rows allow one token");
    expect(!table.may_stop(state) || table.forced_token(state) == Automaton::kNone, "nothing is forced at an end");
    if (count == 1 && !a.accepting[size_t(state)]) {
      const int32_t token = table.forced_token(state);
      expect(token != Automaton::kNone && expected[size_t(token)] == 1, "the forced token is the one of the row");
      expect(table.next_token(state, token) == walked(a, state, tokens[size_t(token)]), "and leads where it should");
    }
  }
}

void test_rows(Random& random) {
  const Scope scope("rows");
  const auto cache = std::make_shared<MaskCache>(1 << 20);
  for (int round = 0; round < 12; round++) {
    const std::vector<std::string> tokens = random_tokens(random, 600);
    const auto trie = trie_of(tokens);
    const Automaton a = round % 3 == 0 ? text_automaton() : random_automaton(random, 1 + random.below(20));
    check_table(MaskTable(trie, a, {kStop}, cache), a, tokens);
  }
  expect(cache->bytes() == 0 && cache->num_rows() == 0, "rows go with their tables");
}

void test_readers(Random& random) {
  const Scope scope("readers");
  const std::vector<std::string> tokens = random_tokens(random, 500);
  const auto trie = trie_of(tokens);
  const auto cache = std::make_shared<MaskCache>(3000);
  const Automaton a = random_automaton(random, 40), text = text_automaton();
  const MaskTable first(trie, a, {kStop}, cache), second(trie, text, {kStop}, cache);
  std::vector<std::vector<uint8_t>> expected;
  for (int32_t s = 0; s < 40; s++) expected.push_back(expected_row(a, s, tokens));
  for (int32_t s = 0; s < text.num_states(); s++) expected.push_back(expected_row(text, s, tokens));
  std::vector<int> wrong(4);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < wrong.size(); t++) {
    threads.emplace_back([&, t] {
      Random own(t);
      for (int i = 0; i < 800; i++) {
        const int32_t s = own.below(int(expected.size()));
        const MaskTable& table = s < 40 ? first : second;
        const RowPtr row = table.row(s < 40 ? s : s - 40);
        wrong[t] += bits_of_row(*row, table.vocab()) != expected[size_t(s)];
        table.forced_token(s < 40 ? s : s - 40);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const int count : wrong) expect(count == 0, "a row under a reader changed");
  expect(cache->bytes() <= 3000, "the cache is larger than it may be");
}

// Draws random allowed tokens with drafts, right and wrong ones; what is known afterwards is a replay of the output.
void test_slots(Random& random) {
  const Scope scope("slots");
  const std::vector<std::string> tokens = random_tokens(random, 400);
  const auto table = std::make_shared<const MaskTable>(trie_of(tokens), text_automaton(), std::vector<int32_t>{kStop},
                                                       std::make_shared<MaskCache>(1 << 20));
  constexpr int32_t kLength = 64, kPrompt = 3;
  for (int round = 0; round < 40; round++) {
    GrammarSlots slots(2), replay(2);
    GrammarUse use;
    use.wants_runs = round % 2 == 0;
    if (round % 3 == 0) use.begins_after = {'b'}, use.repeats = true;
    slots.begin(1, table, use, kPrompt, {});
    std::vector<int32_t> matrix(2 * kLength);
    int32_t* ids = matrix.data() + kLength;
    int32_t length = kPrompt;
    std::vector<uint32_t> words(size_t(mask_words(table->vocab()))), again(words);
    const auto draw = [&](int32_t position) {
      if (!slots.fill(1, position, words.data())) return int32_t('b');
      for (int32_t from = random.below(table->vocab()), i = 0; i < table->vocab(); i++) {
        const int32_t id = (from + i) % table->vocab();
        if (words[size_t(id / 32)] >> (id % 32) & 1) return id;
      }
      return int32_t(0);
    };
    bool ended = false;
    while (!ended && length + 8 < kLength) {
      const int32_t num_drafts = random.below(4);
      for (int32_t i = 0; i < num_drafts; i++) ids[length + i] = random.below(4) ? 'z' : random.below(table->vocab());
      slots.propose(1, length, std::vector<int32_t>(ids + length, ids + length + num_drafts));
      std::vector<SampleRow> rows(size_t(num_drafts) + 1);
      std::vector<int32_t> drawn, places(rows.size(), 7);
      int32_t kept = 0;
      for (int32_t i = 0; i <= num_drafts; i++) {
        SampleRow& row = rows[size_t(i)];
        row.slot = 1, row.position = length - 1 + i, row.target = -1;
        drawn.push_back(draw(row.position));
        if (kept == i && i < num_drafts && drawn.back() == ids[length + i]) kept++;
      }
      const GrammarSlots::Taken taken =
          slots.take(rows.data(), int32_t(rows.size()), drawn.data(), places.data(), matrix.data(), kLength);
      expect(taken.faults.empty(), "an allowed token is a fault");
      const int32_t count = taken.cuts.empty() ? kept + 1 : taken.cuts[0].num_kept;
      std::copy(drawn.begin(), drawn.begin() + count, ids + length);
      length += count;
      for (const GrammarSlots::Turn& turn : taken.turns) {
        expect(turn.index == 7, "a turn of another place");
        length += int32_t(turn.forced.size());
        ended = ended || turn.ends;
      }
      expect(slots.num_known(1) == length - kPrompt, "known tokens");
      expect(replay.begin(0, table, use, kPrompt, std::vector<int32_t>(ids + kPrompt, ids + length)), "a replay fails");
      const bool is_limited = slots.fill(1, length - 1, words.data());
      expect(is_limited == replay.fill(0, length - 1, again.data()) && (!is_limited || words == again),
             "masks differ from a replay");
    }
  }
}

}  // namespace

void test_grammar() {
  Random random(5);
  test_rows(random);
  test_readers(random);
  test_slots(random);
}

}  // namespace sg::test
