# The CSV of `sweep` -> one table per regime and method, the failure shares, and what the title needs.
#   R_M.dat     density[%], speed-up over dense, 90 % error, epsilon (or NaN), broken (0/1); sorted by the sweep
#   failures.dat  regime number, method number, worst failure share over epsilon, its 95 % interval

NR == 1 {
  for (i = 1; i <= NF; ++i) column[$i] = i
  columns = NF
  split("top-k,sample,sinks+window,paper,sdpa,ranked,vattention,dense", order, ",")
  for (i in order) number[order[i]] = i
  wanted = split(regimes, list, ",")
  for (i = 1; i <= wanted; ++i) want[list[i]] = 1
  next
}
NF != columns || $columns == "" { next }
{
  if (values == "") values = $column["values"]
  if ($column["values"] != values) next
  e = $column["epsilon"]
  if (e != "") {
    if (delta == "") delta = $column["delta"]
    if ($column["delta"] + 0 != delta + 0) next
  }
  method = $column["method"]
  if (!(method in number)) next
  m = number[method]
  regime = $column["regime"]
  if (wanted && !(regime in want)) next
  if (!(regime in panel)) {
    panel[regime] = ++panels
    titles = titles " " regime
  }
  r = panel[regime]
  trials = $column["trials"] + 0
  if (trials > most) most = trials
  n = $column["n"]
  dim = $column["dim"]
  broken = 0
  if (e != "") {
    p = $column["failures"] / trials
    # Two standard errors: a promise that is kept with nothing to spare is not called broken by chance.
    broken = p > delta + 2 * sqrt(delta * (1 - delta) / trials)
    if (!((r, m) in worst) || p > worst[r, m]) {
      worst[r, m] = p
      of[r, m] = trials
    }
  }
  if (method == "dense") dense[r] = $column["ms"]  # the first row of a regime
  seen[r, m] = 1
  print 100 * $column["density"], (r in dense ? dense[r] / $column["ms"] : "NaN"), $column["error_p90"], (e == "" ? "NaN" : e),
    broken > (out "/" r "_" m ".dat")
}
END {
  if (!panels) {
    print "no complete row of a sweep in the CSV, of the regimes that are drawn" > "/dev/stderr"
    exit 1
  }
  for (r = 1; r <= panels; ++r) {
    for (m = 4; m <= 7; ++m) {
      if (!((r, m) in worst)) continue
      p = worst[r, m]
      t = of[r, m]
      # Wilson's interval for a binomial share.
      z = 1.96
      middle = (p + z * z / (2 * t)) / (1 + z * z / t)
      half = z * sqrt(p * (1 - p) / t + z * z / (4 * t * t)) / (1 + z * z / t)
      ++judged
      print r, m, p, (middle > half ? middle - half : 0), middle + half > (out "/failures.dat")
    }
  }
  # A method not measured yet: a point beyond the axes, so that the plot need not know.
  for (r = 1; r <= panels; ++r) {
    for (m = 1; m <= 8; ++m) if (!((r, m) in seen)) print "1e-9 1e-9 1e-9 NaN 0" > (out "/" r "_" m ".dat")
  }
  printf "panels = %d\nregimes = '%s'\nvalues = '%s'\nn = '%s'\ndim = '%s'\ndelta = %s\ntrials = %d\njudged = %d\n", panels,
    substr(titles, 2), values, n, dim, (delta == "" ? 0.1 : delta), most, judged > (out "/meta.gp")
}
