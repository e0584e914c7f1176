# Doxygen's filter of the pages: what GitHub shows of a page, in Doxygen's words. Pages and their headings get labels
# (page-NAME, NAME-HEADING), links between pages lead to them, links to what is not on the site become plain text.

# The name of the page at `path`, that of its folder for a README.
function name_of(path) {
  sub(/.*\/bench\/README\.md$|^bench\/README\.md$/, "bench", path)
  sub(/\.md$/, "", path)
  sub(/.*\//, "", path)
  return tolower(path)
}
# As GitHub's anchors, without what is not ASCII: labels are.
function anchor_of(heading) {
  heading = tolower(heading)
  gsub(/[^a-z0-9 _-]/, "", heading)
  gsub(/ /, "-", heading)
  return heading
}
# What stands in place of [text](to); `image` where a ! is before it.
function link(text, to, image,    at, anchor, file) {
  if (image || to ~ /:\/\//) return "[" text "](" to ")"
  at = index(to, "#")
  file = at ? substr(to, 1, at - 1) : to
  anchor = at ? anchor_of(substr(to, at + 1)) : ""
  if (file == "") return "[" text "](@ref " name "-" anchor ")"
  if (file ~ /include\/vattn\/.*\.hpp$/) {
    sub(/.*include\//, "", file)
    return "[" text "](@ref " file ")"
  }
  if (file !~ /\.md$/ || file ~ /examples\//) return text
  if (name_of(file) == "readme") return "[" text "](@ref index)"
  return anchor == "" ? "[" text "](@ref page-" name_of(file) ")" : "[" text "](@ref " name_of(file) "-" anchor ")"
}
function links(line,    done, text, to, start, image) {
  while (match(line, /\[[^][]*\]\([^() ]*\)/)) {
    start = RSTART
    image = start > 1 && substr(line, start - 1, 1) == "!"
    text = substr(line, start + 1, index(substr(line, start), "](") - 2)
    to = substr(line, start + length(text) + 3, RLENGTH - length(text) - 4)
    done = done substr(line, 1, start - 1) link(text, to, image)
    line = substr(line, start + RLENGTH)
  }
  return done line
}

FNR == 1 { name = name_of(FILENAME) }
/^```/ { code = !code; sub(/^```cuda/, "```cpp"); print; next }
code { print; next }
/^#+ / {
  heading = $0
  sub(/^#+ /, "", heading)
  label = anchor_of(heading)
  if (seen[label]++) label = label "-" (seen[label] - 1)
  if (/^# /) label = name == "readme" ? "" : "{#page-" name "}"
  else label = "{#" name "-" label "}"
  print links($0) " " label
  next
}
/^<\/?picture>/ { next }
# Both pictures; site.css shows the one for the page's colours.
/^ *<source .*dark/ {
  match($0, /srcset="[^"]*"/)
  print "<img class=\"dark\" src=\"" substr($0, RSTART + 13, RLENGTH - 14) "\" alt=\"the same, dark\">"
  next
}
/^ *<img / { sub(/<img src="docs\//, "<img class=\"light\" src=\""); print; next }
{ print links($0) }
