// Reports as pages: what they hold, and what a browser draws of it.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/npy.hpp"
#include "support/program.hpp"
#include "support/tiny_llama.hpp"

namespace {

using namespace vattn::test;
using nlohmann::json;

// A folder that would end the page's script, were it written there as it is: .../</script><script>alert(1)<!--/
struct hostile_folder {
  folder f;
  std::string path = f / "<" + "/script><script>alert(1)<!--";
  hostile_folder() { std::filesystem::create_directories(path); }
  [[nodiscard]] std::string operator/(const std::string& name) const { return path + "/" + name; }
};

std::string option(const std::string& name, const std::string& value) { return " --" + name + " '" + value + "'"; }

struct report {
  json data;         // of --json
  std::string page;  // of --html
};

report run(const std::string& program, const std::string& arguments, const hostile_folder& f) {
  const outcome o = run_program(program, arguments + option("json", f / "r.json") + option("html", f / "r.html"));
  CAPTURE(program, arguments, o.text);
  REQUIRE(o.code == 0);
  return {json::parse(read_bytes(f / "r.json")), read_bytes(f / "r.html")};
}

// One for each program, made in f. Queries, keys and values are random.
struct made {
  const char* name;
  std::function<report(const hostile_folder& f)> make;
};

report make_attend(const hostile_folder& f) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  const auto write = [&](const char* name, const std::vector<std::int64_t>& shape) {
    std::vector<float> x(static_cast<std::size_t>(shape[0] * shape[1] * shape[2]));
    for (float& v : x) v = 1 + normal(random);
    vattn::npy::writer out(f / name, shape);
    out.append(x);
    out.commit();
    return option(std::string(1, *name), f / name);
  };
  const std::string inputs = write("q.npy", {3, 4, 16}) + write("k.npy", {1024, 2, 16}) + write("v.npy", {1024, 2, 16});
  return run(VATTN_ATTEND_PROGRAM, inputs + " --causal --trials 20 --epsilon 0.1 --sinks 16 --window 16", f);
}

report make_llama(const hostile_folder& f) {
  tiny_llama model;
  folder here("vattn-llama");
  model.write(here);
  std::filesystem::copy(here.path, f.path, std::filesystem::copy_options::recursive);
  std::mt19937 random(5);
  std::string text(400, ' ');
  for (char& c : text) c = static_cast<char>('a' + random() % 26);
  write_bytes(f / "text", text);
  return run(VATTN_LLAMA_PROGRAM,
             option("model", f.path) + option("text", f / "text") +
                 " --context 300 --bytes 20 --method dense,top-k,vattention --density 0.2 --epsilon 0.1,0.3 --audit "
                 "--threads 1 --sinks 2 --window 2",
             f);
}

report make_synthetic(const hostile_folder& f, const std::string& more = "") {
  return run(VATTN_SYNTHETIC_PROGRAM,
             "--n 4096 --dim 32 --trials 6 --repeats 1 --regimes gauss1,flat --threads 1" + more, f);
}

#ifdef VATTN_CALIBRATE_PROGRAM
report make_calibrate(const hostile_folder& f, const std::string& more = "") {
  return run(VATTN_CALIBRATE_PROGRAM,
             "--regimes gauss1,flat --values mean --n 4096 --dim 32 --draws 10 --sinks 16 --window 16 --epsilons "
             "0.1,0.2 --deltas 0.1,0.2" +
                 more,
             f);
}
#endif

std::vector<made> all_reports() {
  std::vector<made> all{{"attend", make_attend}, {"llama", make_llama}, {"synthetic", [](const hostile_folder& f) {
                                                                           return make_synthetic(f);
                                                                         }}};
#ifdef VATTN_CALIBRATE_PROGRAM
  all.push_back({"calibrate", [](const hostile_folder& f) { return make_calibrate(f); }});
#endif
  return all;
}

std::string between(const std::string& text, const std::string& from, const std::string& to) {
  const std::size_t start = text.find(from);
  REQUIRE(start != std::string::npos);
  const std::size_t end = text.find(to, start + from.size());
  REQUIRE(end != std::string::npos);
  return text.substr(start + from.size(), end - start - from.size());
}

void replace_all(std::string& text, const std::string& from, const std::string& to) {
  for (std::size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size())
    text.replace(at, from.size(), to);
}

const std::string data_tag = "<script type=\"application/json\" id=\"data\">";

// A browser that can show a page here, if there is one.
std::optional<std::string> browser() {
  const char* given = std::getenv("VATTN_CHROMIUM");
  std::vector<std::string> names{"chromium", "chromium-browser", "google-chrome"};
  if (given != nullptr && *given != '\0') names = {given};
  for (const std::string& name : names) {
    if (run_program("/bin/sh", "-c 'command -v \"" + name + "\"'").code == 0) return name;
  }
  return {};
}

// The page as it is after its script has run. The text of nothing where the browser does not start.
std::string shown(const std::string& chromium, const std::string& page, const folder& f) {
  write_bytes(f / "page.html", page);
  return run_program("/usr/bin/env",
                     "timeout 120 '" + chromium + "' --headless --no-sandbox --disable-gpu " +
                         "--disable-dev-shm-usage --no-first-run --user-data-dir='" + f / "profile" +
                         "' --virtual-time-budget=10000 --dump-dom 'file://" + f / "page.html" + "'",
                     false)
      .text;
}

// The numbers of a figure's marks, in their order; NaN where there is none.
std::vector<double> drawn(const std::string& dom, const std::string& id) {
  const std::string figure = between(dom, "<figure id=\"" + id + "\"", "</figure>"), mark = "data-value=\"";
  std::vector<double> numbers;
  for (std::size_t at = 0; (at = figure.find(mark, at)) != std::string::npos;) {
    at += mark.size();
    const std::string number = figure.substr(at, figure.find('"', at) - at);
    numbers.push_back(number == "null" ? std::nan("") : std::stod(number));
  }
  return numbers;
}

void check_drawn(const std::string& dom, const std::string& id, const std::vector<double>& wanted) {
  const std::vector<double> got = drawn(dom, id);
  CAPTURE(id, got, wanted);
  REQUIRE(got.size() == wanted.size());
  bool equal = true;
  for (std::size_t i = 0; i < got.size(); ++i) {
    equal &= std::isnan(wanted[i]) ? std::isnan(got[i])
                                   : std::abs(got[i] - wanted[i]) <= 1e-12 * std::max(1.0, std::abs(wanted[i]));
  }
  CHECK(equal);
}

double number(const json& x) { return x.is_number() ? x.get<double>() : std::nan(""); }

// A number of each row.
std::vector<double> column(const json& rows, const std::function<double(const json&)>& value) {
  std::vector<double> all;
  for (const json& r : rows) all.push_back(value(r));
  return all;
}
std::vector<double> column(const json& rows, const char* key) {
  return column(rows, [key](const json& r) { return number(r.at(key)); });
}

void check_attend(const std::string& dom, const json& data) {
  const json& summary = data.at("summary");
  const std::size_t tokens = summary.at("queries"), heads = summary.at("heads");
  const auto trials = summary.at("trials").get<double>();
  const auto mean = [&](const std::function<double(const json&)>& value) {
    std::vector<double> sums(tokens * heads);
    for (const json& c : data.at("certificates"))
      sums[c.at("token").get<std::size_t>() * heads + c.at("head").get<std::size_t>()] += value(c) / trials;
    return sums;
  };
  const auto failed = [](const json& c) { return static_cast<double>(c.at("failed").get<bool>()); };
  check_drawn(dom, "density", mean([](const json& c) { return number(c.at("density")); }));
  check_drawn(dom, "achieved", mean([](const json& c) { return number(c.at("epsilon_achieved")); }));
  check_drawn(dom, "error", mean([](const json& c) { return number(c.at("target_error")); }));
  check_drawn(dom, "violations", mean(failed));
  std::vector<double> shares(heads);
  for (const json& c : data.at("certificates"))
    shares[c.at("head").get<std::size_t>()] += failed(c) / (trials * static_cast<double>(tokens));
  check_drawn(dom, "shares", shares);
  CHECK(contains(dom, "<section id=\"certificates\" data-records=\"" + std::to_string(data.at("certificates").size())));
}

void check_llama(const std::string& dom, const json& data) {
  // Heads are those of the first run that promises something.
  const json& rows = data.at("rows");
  const auto run = std::find_if(rows.begin(), rows.end(), [](const json& r) { return r.at("violations").is_number(); });
  REQUIRE(run != rows.end());
  const auto heads = [&](const char* key) {
    std::vector<double> all;
    for (const json& layer : run->at("layers")) {
      for (const json& head : layer.at("heads")) all.push_back(number(head.at(key)));
    }
    return all;
  };
  check_drawn(dom, "density", heads("density"));
  check_drawn(dom, "error", heads("error_mean"));
  check_drawn(dom, "error-max", heads("error_max"));
  check_drawn(dom, "violations", heads("violations"));
  check_drawn(dom, "shares", column(run->at("layers"), "violations"));
  std::vector<double> calibration, time;
  for (const json& r : rows) {
    if (r.at("violations").is_number()) calibration.push_back(r.at("violations"));
    const double attention = number(r.at("attention_ms_per_token"));
    time.push_back(attention);
    time.push_back(number(r.at("decode_ms_per_token")) - attention);
  }
  check_drawn(dom, "calibration", calibration);
  check_drawn(dom, "time", time);
  CHECK(contains(dom, "<section id=\"runs\" data-records=\"" + std::to_string(rows.size())));
  CHECK(contains(dom,
                 "<section id=\"heads\" data-records=\"" + std::to_string(rows.size() * run->at("layers").size() * 4)));
}

void check_synthetic(const std::string& dom, const json& data) {
  const json& rows = data.at("rows");
  check_drawn(dom, "density", column(rows, "density"));
  check_drawn(dom, "error", column(rows, "error_p90"));
  check_drawn(dom, "violations", column(rows, "failures"));
  std::vector<double> calibration, speed_up, time(7);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const double ms = rows[i].at("ms");
    if (rows[i].at("promise") == "output") calibration.push_back(rows[i].at("failures"));
    speed_up.push_back(rows[i / 7 * 7].at("ms").get<double>() / ms);  // the first of a regime is dense
    time[i % 7] += ms / static_cast<double>(rows.size() / 7);
  }
  check_drawn(dom, "calibration", calibration);
  check_drawn(dom, "speed-up", speed_up);
  check_drawn(dom, "time", time);
  CHECK(contains(dom, "<section id=\"rows\" data-records=\"" + std::to_string(rows.size())));
}

void check_calibrate(const std::string& dom, const json& data) {
  const json& rows = data.at("rows");
  const auto over = [&](const char* a, const char* b) {
    return column(rows, [=](const json& r) { return number(r.at(a)) / number(r.at(b)); });
  };
  check_drawn(dom, "density", column(rows, "density"));
  check_drawn(dom, "violations", over("failure_share", "delta"));
  check_drawn(dom, "error", over("error_quantile", "epsilon"));
  check_drawn(dom, "achieved", over("achieved_mean", "epsilon"));
  std::vector<double> calibration = column(rows, "failure_share");
  for (const double delta : {0.1, 0.2}) {  // then all cells of each δ
    double failures = 0, draws = 0;
    for (const json& r : rows) {
      if (r.at("delta") == delta) failures += number(r.at("failures")), draws += number(r.at("draws"));
    }
    calibration.push_back(failures / draws);
  }
  check_drawn(dom, "calibration", calibration);
  CHECK(contains(dom, "<section id=\"rows\" data-records=\"" + std::to_string(rows.size())));
}

}  // namespace

TEST_CASE("pages hold the report's own JSON, whatever paths are called, and ask for no other file", "[reports]") {
  for (const made& m : all_reports()) {
    CAPTURE(m.name);
    const hostile_folder f;
    const report r = m.make(f);
    CHECK(r.data.at("program") == m.name);
    const std::string bytes = between(r.page, data_tag, "</script>");
    CHECK(json::parse(bytes) == r.data);
    CHECK_FALSE(contains(bytes, "<"));
    std::string unescaped = bytes;
    replace_all(unescaped, "\\u003c", "<");
    CHECK(unescaped == read_bytes(f / "r.json"));
    // Two scripts beside the data, whatever the title and the data say.
    std::string rest = r.page;
    replace_all(rest, bytes, "");
    for (const char* loads :
         {"http:", "https:", "src=", "href=", "url(", "@import", "import(", "fetch(", "<link", "<img"})
      CHECK_FALSE(contains(rest, loads));
    std::size_t scripts = 0;
    for (std::size_t at = 0; (at = rest.find("<script", at)) != std::string::npos; ++at) ++scripts;
    CHECK(scripts == 3);
    CHECK_FALSE(contains(between(r.page, "<title>", "\n"), "<script"));
    CHECK_FALSE(std::filesystem::exists(f / "r.html.partial"));
  }
}

TEST_CASE("rows have the same names in JSON as in CSV", "[reports]") {
  const hostile_folder f;
  const auto check = [&](const json& data) {
    const std::string csv = read_bytes(f / "r.csv");
    CHECK(static_cast<std::size_t>(std::count(csv.begin(), csv.end(), '\n')) == data.at("rows").size() + 1);
    std::set<std::string> columns, names;
    std::istringstream header(csv.substr(0, csv.find('\n')));
    for (std::string name; std::getline(header, name, ',');) columns.insert(name);
    for (const auto& [name, value] : data.at("rows").at(0).items()) names.insert(name);
    CHECK(columns == names);
  };
  check(make_synthetic(f, option("csv", f / "r.csv")).data);
#ifdef VATTN_CALIBRATE_PROGRAM
  check(make_calibrate(f, option("csv", f / "r.csv")).data);
#endif
}

TEST_CASE("pages that cannot be written are refused before the work", "[reports]") {
  const hostile_folder f;
  const std::string small = "--n 256 --dim 8 --trials 1 --repeats 1 --regimes gauss1";
  const auto refused = [&](const std::string& more, const std::string& words) {
    check_refused(VATTN_SYNTHETIC_PROGRAM, "synthetic", small + more, words);
  };
  refused(option("html", f / "none/r.html"), "make its folder first");
  refused(option("html", f.path), "is a directory");
  refused(option("html", f / "r") + option("json", f / "r"), "--json and --html are the same file");
  refused(option("html", f / "r") + option("csv", f / "r"), "--html and --csv are the same file");
  CHECK(std::filesystem::is_empty(f.path));
}

TEST_CASE("a browser draws the report's own numbers without an error", "[reports][browser]") {
  const std::optional<std::string> chromium = browser();
  const folder profile;
  if (!chromium) {
    WARN("no Chromium: skipped (install one, or name it in VATTN_CHROMIUM)");
    return;
  }
  if (!contains(shown(*chromium, "<title>try</title>", profile), "<title>try</title>")) {
    WARN("no Chromium: skipped (" << *chromium << " is there and does not show a page)");
    return;
  }
  const std::map<std::string, void (*)(const std::string&, const json&)> checks{
      {"attend", check_attend}, {"llama", check_llama}, {"synthetic", check_synthetic}, {"calibrate", check_calibrate}};
  for (const made& m : all_reports()) {
    CAPTURE(m.name);
    const hostile_folder f;
    const report r = m.make(f);
    const std::string dom = shown(*chromium, r.page, profile);
    const std::string root = between(dom, "<html", ">");
    CAPTURE(root);
    CHECK(contains(root, "data-ready=\"true\""));
    CHECK_FALSE(contains(root, "data-errors"));
    std::size_t figures = 0;
    for (std::size_t at = 0; (at = dom.find("<figure id=", at)) != std::string::npos; ++at) ++figures;
    CHECK(contains(root, "data-figures=\"" + std::to_string(figures) + "\""));
    checks.at(m.name)(dom, r.data);
    if (std::string(m.name) != "attend") continue;
    // A click on a cell finds its certificates in the table: one a draw.
    std::string clicked = r.page;
    replace_all(clicked, "</body>",
                "<script>document.querySelectorAll('#density [data-text]')[5].dispatchEvent("
                "new MouseEvent('click', {bubbles: true}))</script></body>");
    CHECK(contains(between(shown(*chromium, clicked, profile), "<section id=\"certificates\"", ">"),
                   "data-found=\"20\""));
  }
  // A report that is not what the page expects is an error, and said to be one.
  const std::string broken = shown(
      *chromium,
      [&] {
        const hostile_folder f;
        std::string page = make_synthetic(f).page;
        replace_all(page, "\"program\"", "\"other\"");
        return page;
      }(),
      profile);
  CHECK(contains(between(broken, "<html", ">"), "data-errors=\"1\""));
  CHECK(contains(between(broken, "id=\"errors\"", "</p>"), "could not draw"));
}
