// NumPy's .npy files, read with every byte checked, and written.
#pragma once

#include <bit>
#include <cctype>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "support/atomic_file.hpp"

namespace vattn::npy {

static_assert(std::endian::native == std::endian::little, "npy.hpp: arrays are read as they lie, little-endian");

enum class dtype : std::uint8_t { float16, float32, float64, uint16 };

[[nodiscard]] constexpr std::size_t size_of(dtype type) {
  return type == dtype::float64 ? 8 : type == dtype::float32 ? 4 : 2;
}
[[nodiscard]] constexpr const char* to_string(dtype type) {
  constexpr const char* names[] = {"float16", "float32", "float64", "uint16"};
  return names[static_cast<std::size_t>(type)];
}

/// C order. `bytes` holds exactly the product of `shape` elements.
struct array {
  std::vector<std::int64_t> shape;
  dtype type = dtype::float32;
  std::vector<std::byte> bytes;

  [[nodiscard]] std::size_t size() const { return bytes.size() / size_of(type); }
  /// T must have the size of an element; the storage is aligned for any of them.
  template <class T>
  [[nodiscard]] std::span<const T> as() const {
    return {reinterpret_cast<const T*>(bytes.data()), bytes.size() / sizeof(T)};
  }
};

/// "[16384, 2, 64]"
[[nodiscard]] inline std::string to_string(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

namespace detail {

/// Text from a file, fit for one line of a message.
[[nodiscard]] inline std::string printable(std::string_view text) {
  std::string out;
  for (const char c : text.substr(0, 48)) out += c >= ' ' && c <= '~' ? c : '?';
  return text.size() > 48 ? out + "..." : out;
}

/// The header: a Python dict literal with the keys descr, fortran_order and shape, in any order.
class header {
 public:
  std::string descr;
  bool structured = false, fortran = false;
  std::vector<std::int64_t> shape;

  /// Throws std::runtime_error with the reason alone.
  explicit header(std::string_view text) : rest_(text) {
    bool seen[3] = {};
    expect('{');
    while (!accept('}')) {
      const std::string key = quoted();
      expect(':');
      const std::size_t which = key == "descr" ? 0 : key == "fortran_order" ? 1 : key == "shape" ? 2 : 3;
      if (which == 3) fail("its header has the unknown key '" + printable(key) + "'");
      if (seen[which]) fail("its header has the key '" + key + "' twice");
      seen[which] = true;
      if (which == 0) read_descr();
      if (which == 1) read_order();
      if (which == 2) read_shape();
      if (!accept(',')) {
        expect('}');
        break;
      }
    }
    if (!seen[0] || !seen[1] || !seen[2]) fail("its header lacks one of 'descr', 'fortran_order', 'shape'");
    skip();
    if (!rest_.empty()) fail("its header goes on after the closing brace: '" + printable(rest_) + "'");
  }

 private:
  [[noreturn]] static void fail(const std::string& what) { throw std::runtime_error(what); }

  void skip() {
    while (!rest_.empty() && (rest_[0] == ' ' || rest_[0] == '\n' || rest_[0] == '\t' || rest_[0] == '\r'))
      rest_.remove_prefix(1);
  }
  bool accept(char c) {
    skip();
    if (rest_.empty() || rest_[0] != c) return false;
    rest_.remove_prefix(1);
    return true;
  }
  void expect(char c) {
    if (!accept(c))
      fail(std::string("its header is no NumPy header: expected '") + c + "' at '" + printable(rest_) + "'");
  }
  std::string quoted() {
    skip();
    const char quote = rest_.empty() ? '\0' : rest_[0];
    const std::size_t end = quote == '\'' || quote == '"' ? rest_.find(quote, 1) : std::string_view::npos;
    if (end == std::string_view::npos)
      fail("its header is no NumPy header: expected a string at '" + printable(rest_) + "'");
    std::string text(rest_.substr(1, end - 1));
    rest_.remove_prefix(end + 1);
    return text;
  }
  void read_descr() {
    skip();
    structured = rest_.starts_with('[') || rest_.starts_with('(');
    if (structured) fail("it is a structured array: save one plain array of float32, float16 or uint16");
    descr = quoted();
  }
  void read_order() {
    skip();
    const auto is = [this](std::string_view word) {
      if (!rest_.starts_with(word)) return false;
      rest_.remove_prefix(word.size());
      return true;
    };
    fortran = is("True");
    if (!fortran && !is("False")) fail("its header's fortran_order is neither True nor False");
  }
  void read_shape() {
    expect('(');
    while (!accept(')')) {
      skip();
      if (rest_.starts_with('-')) fail("its shape has a negative extent: '" + printable(rest_) + "'");
      std::int64_t extent = 0;
      std::size_t digits = 0;
      for (; digits < rest_.size() && std::isdigit(static_cast<unsigned char>(rest_[digits])); ++digits) {
        const int digit = rest_[digits] - '0';
        if (extent > (std::numeric_limits<std::int64_t>::max() - digit) / 10)
          fail("its shape has an extent past 2^63: '" + printable(rest_) + "'");
        extent = 10 * extent + digit;
      }
      if (digits == 0) fail("its shape is no tuple of whole numbers: '" + printable(rest_) + "'");
      rest_.remove_prefix(digits);
      if (rest_.starts_with('L')) rest_.remove_prefix(1);  // NumPy under Python 2
      shape.push_back(extent);
      if (shape.size() > 32) fail("its shape has more than 32 axes");
      if (!accept(',')) {
        expect(')');
        break;
      }
    }
  }

  std::string_view rest_;
};

[[nodiscard]] inline dtype parse_dtype(const std::string& descr) {
  const auto fail = [&](const std::string& what) { throw std::runtime_error("its dtype is " + what); };
  if (descr == "<f2") return dtype::float16;
  if (descr == "<f4") return dtype::float32;
  if (descr == "<f8") return dtype::float64;
  if (descr == "<u2") return dtype::uint16;
  std::string shown = "'";  // += where GCC 12 warns of an overlap in +
  shown += printable(descr);
  shown += '\'';
  if (descr.starts_with('>')) fail(shown + ", big-endian: save it with a.astype(a.dtype.newbyteorder('<'))");
  if (descr.find('O') != std::string::npos)
    fail(shown + ", pickled Python objects, which are never loaded: save an array of numbers");
  if (descr == "|V2" || descr == "<V2")
    fail(shown + ", two raw bytes: save bfloat16 as a.view(numpy.uint16) and say that it is bfloat16");
  fail(shown + ": save float32, float16, or bfloat16 as uint16, such as a.astype(numpy.float32)");
  return dtype::float32;
}

/// Elements, such that elements·item fits in 64 bits.
[[nodiscard]] inline std::uint64_t element_count(std::span<const std::int64_t> shape, std::size_t item) {
  std::uint64_t count = 1;
  bool empty = false;
  for (const std::int64_t extent : shape) empty |= extent == 0;
  if (empty) return 0;
  for (const std::int64_t extent : shape) {
    const auto e = static_cast<std::uint64_t>(extent);
    if (count > std::numeric_limits<std::uint64_t>::max() / item / e)
      throw std::runtime_error("its shape " + to_string(shape) + " comes to more bytes than 64 bits can count");
    count *= e;
  }
  return count;
}

}  // namespace detail

/// Reads versions 1 to 3. Memory: the header and, once the sizes agree, the data; never more than the file
/// holds. Throws std::runtime_error with one line that names the file and the remedy.
[[nodiscard]] inline array read(const std::filesystem::path& path) {
  const std::string name = path.string();
  const auto fail = [&](const std::string& what) { throw std::runtime_error(name + ": " + what); };
  std::error_code error;
  const auto kind = std::filesystem::status(path, error).type();
  if (kind == std::filesystem::file_type::not_found) fail("no such file");
  if (kind != std::filesystem::file_type::regular) fail("not a regular file: give a .npy file");
  const std::uint64_t file_size = std::filesystem::file_size(path, error);
  if (error) fail(error.message());
  std::ifstream in(path, std::ios::binary);
  if (!in) fail("cannot be opened: check its permissions");
  const auto read_bytes = [&](void* to, std::size_t count, const char* what) {
    if (count > 0 && !in.read(static_cast<char*>(to), static_cast<std::streamsize>(count)))
      fail(std::string("truncated in its ") + what + ": write it again");
  };

  unsigned char start[8] = {};
  if (file_size < 10)
    fail("not a .npy file: " + std::to_string(file_size) + " bytes are less than its shortest header");
  read_bytes(start, sizeof start, "first bytes");
  if (std::memcmp(start, "\x93NUMPY", 6) != 0) {
    fail(std::memcmp(start, "PK", 2) == 0
             ? "a zip archive (.npz?), not a .npy file: save each array with numpy.save"
             : "not a .npy file (it does not begin with \\x93NUMPY): write it with numpy.save");
  }
  const unsigned major = start[6], minor = start[7];
  if (major < 1 || major > 3 || minor != 0)
    fail(".npy version " + std::to_string(major) + "." + std::to_string(minor) + " is not known: 1.0 to 3.0 are");
  const std::size_t length_bytes = major == 1 ? 2 : 4, prefix = sizeof start + length_bytes;
  unsigned char length[4] = {};
  read_bytes(length, length_bytes, "header");
  std::uint64_t header_size = 0;
  for (std::size_t i = length_bytes; i-- > 0;) header_size = header_size << 8 | length[i];
  if (file_size < prefix || header_size > file_size - prefix)
    fail("truncated: its header should be " + std::to_string(header_size) + " bytes, but the file ends after " +
         std::to_string(file_size < prefix ? 0 : file_size - prefix));
  std::string text(static_cast<std::size_t>(header_size), '\0');
  read_bytes(text.data(), text.size(), "header");

  array a;
  std::uint64_t bytes = 0;
  try {
    const detail::header h(text);
    a.type = detail::parse_dtype(h.descr);
    a.shape = h.shape;
    bytes = detail::element_count(a.shape, size_of(a.type)) * size_of(a.type);
    // A vector is both C and Fortran order.
    if (h.fortran && a.shape.size() > 1)
      throw std::runtime_error("it is in Fortran order: save it with numpy.save(f, numpy.ascontiguousarray(a))");
  } catch (const std::runtime_error& reason) {
    fail(reason.what());
  }
  const std::uint64_t present = file_size - prefix - header_size;
  if (bytes != present) {
    fail(to_string(a.shape) + " of " + to_string(a.type) + " takes " + std::to_string(bytes) +
         " bytes, but the file has " + std::to_string(present) +
         (bytes > present ? ": truncated, write it again" : ": there is something after the array"));
  }
  a.bytes.resize(static_cast<std::size_t>(bytes));
  read_bytes(a.bytes.data(), a.bytes.size(), "data");
  return a;
}

/// Writes a float32 array piece by piece; the file appears on `commit`, when all of it is there.
class writer {
 public:
  writer(const std::filesystem::path& path, std::span<const std::int64_t> shape)
      : file_(path), left_(detail::element_count(shape, sizeof(float))) {
    std::string text = "{'descr': '<f4', 'fortran_order': False, 'shape': (";
    for (const std::int64_t extent : shape) text += std::to_string(extent) + ", ";
    text += "), }";
    if (shape.size() > 1) text.erase(text.find(", ), }"), 2);
    const std::size_t prefix = 10;
    text.append(63 - (prefix + text.size()) % 64, ' ');  // data at a multiple of 64, as NumPy does
    text += '\n';
    const unsigned char start[prefix] = {0x93,
                                         'N',
                                         'U',
                                         'M',
                                         'P',
                                         'Y',
                                         1,
                                         0,
                                         static_cast<unsigned char>(text.size() % 256),
                                         static_cast<unsigned char>(text.size() / 256)};
    file_.write(start, prefix);
    file_.write(text.data(), text.size());
  }

  void append(std::span<const float> values) {
    if (values.size() > left_) throw std::logic_error("npy::writer: more values than the shape holds");
    left_ -= values.size();
    file_.write(values.data(), values.size_bytes());
  }

  void commit() {
    if (left_ != 0) throw std::logic_error("npy::writer: fewer values than the shape holds");
    file_.commit();
  }

 private:
  support::atomic_file file_;
  std::uint64_t left_;
};

}  // namespace vattn::npy
