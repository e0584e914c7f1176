// The look loop by a design that does as it is told: what is asked of a design, in which order, and when it ends.
#include "vattn/call/looks.hpp"

#include <array>
#include <string>
#include <vector>

#include "support/catch.hpp"

namespace {

using namespace vattn;
using head_type = std::remove_cvref_t<decltype(std::declval<const kv_view<float>&>().head(0, 0))>;

// A letter for each thing that is asked, and a digit for the head that it is asked of.
struct scripted_design {
  bool begins = true;
  std::vector<draw_outcome> draws{};              // the last one from then on
  std::vector<std::array<soundness, 2>> worth{};  // of a look that is judged, of each head; the last from then on
  std::array<int, 2> enough_at{1, 1};             // looks that were judged
  bool asks = true;
  std::string calls{};
  std::size_t drawn_looks = 0, judged = 0;

  bool begin() {
    calls += 'b';
    return begins;
  }
  draw_outcome draw() {
    calls += 'd';
    const draw_outcome now = draws.empty() ? draw_outcome::sample : draws[std::min(drawn_looks, draws.size() - 1)];
    ++drawn_looks;
    judged += now == draw_outcome::sample ? 1 : 0;
    return now;
  }
  soundness evidence(index_t h, stats::evidence& e) {
    add('e', h);
    e.denominator = 1;
    return worth.empty() ? soundness::sound : worth[std::min(judged, worth.size()) - 1][static_cast<std::size_t>(h)];
  }
  stats::verdict judge(index_t h, const stats::evidence&) {
    stats::verdict v;
    v.met = static_cast<int>(judged) >= enough_at[static_cast<std::size_t>(h)];
    return v;
  }
  bool suffices(index_t, const stats::evidence&, const stats::verdict& v) { return v.met; }
  bool next(index_t h, const stats::evidence&, const stats::verdict&) {
    add('n', h);
    return asks;
  }
  void record(index_t h, const stats::evidence&, const stats::verdict&) { add('r', h); }
  void add(char what, index_t h) { calls += what, calls += static_cast<char>('0' + h); }
};
static_assert(sampling_design<scripted_design>);

struct two_heads {
  two_heads() {
    const auto head = contiguous_kv(row.data(), row.data(), {.n_tokens = 1, .dk = 2, .dv = 2}).head(0, 0);
    for (int h = 0; h < 2; ++h) {
      group.push(
          {.row = {.head = head, .scaled_query = row.data()}, .tokens = {0, 1}, .stream = {{1, 0, 0}, 0}, .s = {}});
    }
  }
  std::string run(scripted_design design, index_t looks = 4) {
    look_until_verified(design, group, looks);
    return design.calls;
  }
  [[nodiscard]] bool done(index_t h) { return group[h].done; }

  std::array<float, 2> row{1, 1};
  head_group<head_type> group;
};

TEST_CASE("each head is recorded at the look that is enough for it, and not looked at again", "[looks]") {
  two_heads heads;
  CHECK(heads.run({.enough_at = {3, 1}}) == "bde0n0e1r1de0n0de0r0");
  CHECK((heads.done(0) && heads.done(1)));
  CHECK(heads.group[0].c.rounds == 3);
  CHECK(heads.group[1].c.rounds == 1);
}

TEST_CASE("a design that cannot begin, or reads too much, has no look", "[looks]") {
  two_heads heads;
  CHECK(heads.run({.begins = false}) == "b");
  CHECK(heads.run({.draws = {draw_outcome::too_much}}) == "bd");
  CHECK(heads.group[0].c.rounds == 0);
  CHECK(!heads.done(0));
}

TEST_CASE("a draw that shows nothing counts as a look", "[looks]") {
  two_heads heads;
  CHECK(heads.run({.draws = {draw_outcome::nothing, draw_outcome::sample}}) == "bdde0r0e1r1");
  CHECK(heads.group[0].c.rounds == 2);
  two_heads others;
  CHECK(others.run({.draws = {draw_outcome::nothing}}, 3) == "bddd");
}

TEST_CASE("looks end at their number, or when no head asks for another", "[looks]") {
  two_heads heads;
  CHECK(heads.run({.enough_at = {9, 9}}, 2) == "bde0n0e1n1de0n0e1n1");
  CHECK(!heads.done(0));
  CHECK(heads.run({.enough_at = {9, 9}, .asks = false}) == "bde0n0e1n1");
}

TEST_CASE("a head whose sample says nothing is left alone; or all of them are", "[looks]") {
  two_heads heads;
  CHECK(heads.run({.worth = {{soundness::not_this_head, soundness::sound}}, .enough_at = {1, 2}}) == "bde0e1n1de0e1r1");
  CHECK((!heads.done(0) && heads.done(1)));
  two_heads others;
  CHECK(others.run({.worth = {{soundness::no_head, soundness::sound}}}) == "bde0");
  CHECK(!others.done(1));
}

TEST_CASE("heads that failed are not judged", "[looks]") {
  two_heads heads;
  heads.group[0].ok = false;
  CHECK(heads.run({}) == "bde1r1");
}

TEST_CASE("an estimate is put into a head's state", "[looks]") {
  two_heads heads;
  std::array<float, 2> numerator{}, output{};
  heads.group[0].state = softmax_state(numerator);
  const std::array<float, 2> estimate{3, -1};
  put_estimate(heads.group[0], 2.0f, 5.0, estimate.data(), 0.5f);
  const float lse = heads.group[0].state.finish(output);
  CHECK(output == std::array<float, 2>{1.5f, -0.5f});
  CHECK(lse == static_cast<float>(2 + std::log(5.0)));
}

}  // namespace
