// Safetensors files, alone or as the shards of a folder, read with every byte of their headers checked.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "vattn/kernel/row.hpp"

namespace vattn::safetensors {

// Format. 8 bytes: the length N of the header, little-endian; N bytes of JSON,
//   {"name": {"dtype": "BF16", "shape": [512, 64], "data_offsets": [begin, end]}, ..., "__metadata__": {...}}
// then the data, to which the offsets refer; row-major. Tensors cover the data without overlap or hole.
static_assert(std::endian::native == std::endian::little, "safetensors.hpp: data is read as it lies, little-endian");

enum class dtype : std::uint8_t { float32, float16, bfloat16, other };

struct tensor {
  std::string type_name;  // as the file says
  dtype type = dtype::other;
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0, end = 0;  // bytes, from the start of the data
};

/// "[512, 64]"
[[nodiscard]] inline std::string to_string(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

namespace detail {

/// Text from a file, fit for one line of a message.
[[nodiscard]] inline std::string printable(std::string_view text, std::size_t most = 80) {
  std::string out;
  for (const char c : text.substr(0, most)) out += c >= ' ' && c <= '~' ? c : '?';
  if (text.size() > most) out += "...";
  return out;
}

/// A name from a file, in quotes. += where GCC 12 warns of an overlap in +.
[[nodiscard]] inline std::string in_quotes(std::string_view name) {
  std::string out(1, '\'');
  out += printable(name);
  out += '\'';
  return out;
}

/// Bits of an element; 0 for a type that the format does not know.
[[nodiscard]] inline std::uint64_t bits_of(std::string_view type) {
  static const std::map<std::string_view, std::uint64_t> known{
      {"F64", 64},  {"I64", 64}, {"U64", 64}, {"C64", 64},    {"F32", 32},    {"I32", 32}, {"U32", 32}, {"F16", 16},
      {"BF16", 16}, {"I16", 16}, {"U16", 16}, {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"I8", 8},   {"U8", 8},   {"BOOL", 8}};
  const auto found = known.find(type);
  return found == known.end() ? 0 : found->second;
}

/// A JSON object whose keys, on its first level, differ. Throws std::runtime_error with the reason alone.
[[nodiscard]] inline nlohmann::json parse_object(std::string_view text, const char* what) {
  std::set<std::string> keys;
  std::string twice;
  const auto check = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& value) {
    if (depth == 1 && event == nlohmann::json::parse_event_t::key &&
        !keys.insert(value.get_ref<const std::string&>()).second && twice.empty())
      twice = value.get<std::string>();
    return true;
  };
  nlohmann::json parsed;
  try {
    parsed = nlohmann::json::parse(text.begin(), text.end(), check);
  } catch (const nlohmann::json::exception& e) {
    // Its messages quote the text, which may hold anything.
    throw std::runtime_error(std::string(what) + " is no JSON: " + printable(e.what(), 160));
  }
  if (!parsed.is_object()) throw std::runtime_error(std::string(what) + " is no JSON object");
  if (!twice.empty()) throw std::runtime_error(std::string(what) + " has " + in_quotes(twice) + " twice");
  return parsed;
}

[[nodiscard]] inline std::uint64_t file_size(const std::filesystem::path& path) {
  std::error_code error;
  const auto kind = std::filesystem::status(path, error).type();
  if (kind == std::filesystem::file_type::not_found) throw std::runtime_error("no such file");
  if (kind != std::filesystem::file_type::regular) throw std::runtime_error("not a regular file");
  const std::uint64_t size = std::filesystem::file_size(path, error);
  if (error) throw std::runtime_error(error.message());
  return size;
}

}  // namespace detail

/// One file. Opens and checks the header; tensors are read when they are asked for. Every error is a
/// std::runtime_error with one line that names the file.
class file {
 public:
  explicit file(const std::filesystem::path& path) : path_(path) {
    try {
      open();
    } catch (const std::runtime_error& e) {
      fail(e.what());
    }
  }

  [[nodiscard]] const std::filesystem::path& path() const { return path_; }
  [[nodiscard]] const std::map<std::string, tensor>& tensors() const { return tensors_; }

  /// As floats; `out` has as many as the tensor has elements.
  void read(const std::string& name, std::span<float> out) {
    const tensor& t = tensors_.at(name);
    in_.clear();
    in_.seekg(static_cast<std::streamoff>(data_ + t.begin));
    if (t.type == dtype::float32) return read_bytes(out.data(), out.size_bytes(), name);
    if (t.type == dtype::other)
      fail(detail::in_quotes(name) + " is " + detail::printable(t.type_name) + ": save the model as BF16, F16 or F32");
    std::vector<std::uint16_t> bits(out.size());
    read_bytes(bits.data(), 2 * bits.size(), name);
    for (std::size_t i = 0; i < bits.size(); ++i)
      out[i] = t.type == dtype::float16 ? kernel::half_to_float(bits[i]) : kernel::bfloat16_to_float(bits[i]);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const { throw std::runtime_error(path_.string() + ": " + what); }

  void read_bytes(void* to, std::size_t count, const std::string& what) {
    if (count > 0 && !in_.read(static_cast<char*>(to), static_cast<std::streamsize>(count)))
      fail("cannot read " + detail::in_quotes(what) + ": the file has changed, or the disk fails");
  }

  void open() {
    const std::uint64_t size = detail::file_size(path_);
    in_.open(path_, std::ios::binary);
    if (!in_) throw std::runtime_error("cannot be opened: check its permissions");
    std::uint64_t length = 0;
    if (size < sizeof length)
      throw std::runtime_error("no safetensors file: " + std::to_string(size) + " bytes are less than a header");
    in_.read(reinterpret_cast<char*>(&length), sizeof length);
    if (!in_) throw std::runtime_error("cannot be read");
    if (length > size - sizeof length)
      throw std::runtime_error("its header should be " + std::to_string(length) + " bytes, but the file ends after " +
                               std::to_string(size - sizeof length) + ": truncated, or no safetensors file");
    constexpr std::uint64_t most = 100'000'000;  // the format's own limit
    if (length > most) throw std::runtime_error("its header of " + std::to_string(length) + " bytes is past 10^8");
    std::string text(static_cast<std::size_t>(length), '\0');
    if (!text.empty() && !in_.read(text.data(), static_cast<std::streamsize>(text.size())))
      throw std::runtime_error("cannot be read");
    data_ = sizeof length + length;
    const nlohmann::json header = detail::parse_object(text, "its header");
    for (const auto& [name, entry] : header.items()) {
      if (name != "__metadata__") tensors_.emplace(name, parse(name, entry));
    }
    check_layout(size - data_);
  }

  [[nodiscard]] static tensor parse(const std::string& name, const nlohmann::json& entry) {
    const auto bad = [&](const std::string& what) -> std::runtime_error {
      return std::runtime_error(detail::in_quotes(name) + " " + what);
    };
    for (const char* key : {"dtype", "shape", "data_offsets"}) {
      if (!entry.is_object() || !entry.contains(key)) throw bad("has no " + std::string(key));
    }
    tensor t;
    if (!entry["dtype"].is_string()) throw bad("has a dtype that is no string");
    t.type_name = entry["dtype"].get<std::string>();
    t.type = t.type_name == "F32"    ? dtype::float32
             : t.type_name == "F16"  ? dtype::float16
             : t.type_name == "BF16" ? dtype::bfloat16
                                     : dtype::other;
    const std::uint64_t bits = detail::bits_of(t.type_name);
    if (bits == 0) throw bad("is of the unknown dtype " + detail::in_quotes(t.type_name));

    const nlohmann::json &shape = entry["shape"], &offsets = entry["data_offsets"];
    const auto whole = [](const nlohmann::json& x) { return x.is_number_unsigned(); };
    if (!shape.is_array() || !std::all_of(shape.begin(), shape.end(), whole))
      throw bad("has a shape that is no list of whole numbers from 0");
    if (!offsets.is_array() || offsets.size() != 2 || !whole(offsets[0]) || !whole(offsets[1]))
      throw bad("has data_offsets that are not two whole numbers from 0");
    std::uint64_t bytes = bits / 8;
    for (const auto& extent : shape) {
      const auto e = extent.get<std::uint64_t>();
      constexpr auto limit = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
      if (e > limit || (e > 0 && bytes > limit / e)) throw bad("has a shape of more than 2^63 bytes");
      bytes *= e;
      t.shape.push_back(static_cast<std::int64_t>(e));
    }
    t.begin = offsets[0].get<std::uint64_t>(), t.end = offsets[1].get<std::uint64_t>();
    if (t.begin > t.end) throw bad("ends before it begins: data_offsets must ascend");
    if (t.end - t.begin != bytes)
      throw bad("is " + to_string(t.shape) + " of " + t.type_name + ", " + std::to_string(bytes) +
                " bytes, but its data_offsets hold " + std::to_string(t.end - t.begin));
    return t;
  }

  void check_layout(std::uint64_t data_size) const {
    std::vector<const std::pair<const std::string, tensor>*> order;
    for (const auto& each : tensors_) order.push_back(&each);
    std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
      return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
    });
    std::uint64_t at = 0;
    for (const auto* each : order) {
      const std::string name = detail::in_quotes(each->first);
      const tensor& t = each->second;
      if (t.end > data_size)
        throw std::runtime_error(name + " ends at byte " + std::to_string(t.end) + " of the data, which has " +
                                 std::to_string(data_size) + ": truncated, fetch it again");
      if (t.begin < at) throw std::runtime_error(name + " overlaps another tensor");
      if (t.begin > at) throw std::runtime_error("there is a hole before " + name);
      at = t.end;
    }
    if (at != data_size)
      throw std::runtime_error("there are " + std::to_string(data_size - at) + " bytes after the last tensor");
  }

  std::filesystem::path path_;
  std::ifstream in_;
  std::uint64_t data_ = 0;  // where the data begins
  std::map<std::string, tensor> tensors_;
};

/// The tensors of a model's folder: model.safetensors, or the shards that model.safetensors.index.json names.
class folder {
 public:
  explicit folder(const std::filesystem::path& path) : path_(path) {
    std::error_code ignored;
    const auto one = path / "model.safetensors", index = path / "model.safetensors.index.json";
    if (std::filesystem::exists(index, ignored)) {
      open_shards(index);
    } else if (std::filesystem::exists(one, ignored)) {
      add(one);
    } else {
      throw std::runtime_error(path.string() +
                               ": neither model.safetensors nor model.safetensors.index.json: give the folder of a "
                               "Hugging Face model");
    }
  }

  [[nodiscard]] bool contains(const std::string& name) const { return where_.contains(name); }

  /// Throws unless there is such a tensor, of this shape.
  void require(const std::string& name, std::span<const std::int64_t> shape) const {
    const auto found = where_.find(name);
    if (found == where_.end()) throw std::runtime_error(path_.string() + ": the tensor '" + name + "' is missing");
    const tensor& t = files_[found->second].tensors().at(name);
    if (!std::equal(t.shape.begin(), t.shape.end(), shape.begin(), shape.end()))
      throw std::runtime_error(files_[found->second].path().string() + ": '" + name + "' is " + to_string(t.shape) +
                               ", but config.json asks for " + to_string(shape));
  }

  /// Of a tensor that was required, as floats.
  void read(const std::string& name, std::span<float> out) { files_[where_.at(name)].read(name, out); }

 private:
  void add(const std::filesystem::path& path) {
    files_.emplace_back(path);
    for (const auto& each : files_.back().tensors()) {
      if (!where_.emplace(each.first, files_.size() - 1).second)
        throw std::runtime_error(path.string() + ": " + detail::in_quotes(each.first) + " is in another shard too");
    }
  }

  void open_shards(const std::filesystem::path& index) {
    std::map<std::string, std::string> promised;
    std::set<std::string> shards;
    try {
      if (detail::file_size(index) > 100'000'000) throw std::runtime_error("larger than 10^8 bytes");
      std::ifstream in(index, std::ios::binary);
      const std::string text{std::istreambuf_iterator<char>(in), {}};
      const nlohmann::json parsed = detail::parse_object(text, "the index");
      if (!parsed.contains("weight_map") || !parsed["weight_map"].is_object())
        throw std::runtime_error("it has no weight_map");
      for (const auto& entry : parsed["weight_map"].items()) {
        const auto bad = [&](const char* what) {
          return std::runtime_error("the shard of " + detail::in_quotes(entry.key()) + " " + what);
        };
        if (!entry.value().is_string()) throw bad("is no file name");
        const auto shard = entry.value().get<std::string>();
        // A file beside the index: a name that leads elsewhere is none of ours.
        if (shard.empty() || shard.find_first_of(std::string_view("/\\\0", 3)) != std::string::npos ||
            shard.starts_with('.'))
          throw bad("is no plain file name");
        promised[entry.key()] = shard;
        shards.insert(shard);
      }
    } catch (const std::runtime_error& e) {
      throw std::runtime_error(index.string() + ": " + e.what());
    }
    for (const std::string& shard : shards) add(path_ / shard);
    for (const auto& [name, shard] : promised) {
      const auto found = where_.find(name);
      if (found == where_.end() || files_[found->second].path().filename() != shard)
        throw std::runtime_error((path_ / shard).string() + ": " + detail::in_quotes(name) +
                                 " should be in it, says the index, and is not");
    }
  }

  std::filesystem::path path_;
  std::vector<file> files_;
  std::map<std::string, std::size_t> where_;
};

}  // namespace vattn::safetensors
