# Rows and time against error, from the tables of sweep_tables.awk. Called by tools/plot_sweep, which sets `work` (their
# folder), `dark` (0 or 1), `markers` (their size), the terminal and the output. A column for each regime:
# above against rows, below against time.

# Okabe and Ito's palette, lighter on a dark page: told apart with any colour vision, and by marker in grey.
array name[8] = ["top-k, exact scores", "uniform sample", "sinks + window", "paper (denominator)", "verified SDPA", \
                 "ranked by exact scores", "vattention, index", "dense"]
array light_colour[8] = ["#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7", "#7A7A7A", "#0072B2", "#000000"]
array dark_colour[8] = ["#E69F00", "#2DC79A", "#56B4E9", "#F07030", "#DD9CC0", "#A0A0A0", "#4AA8FF", "#F0F0F0"]
array colour[8]
do for [m = 1:8] { colour[m] = dark ? dark_colour[m] : light_colour[m] }
ink = dark ? "#E6EDF3" : "#202020"; faint = dark ? "#30363D" : "#E4E4E4"; frame = dark ? "#8B949E" : "#606060"
paper = dark ? "#0D1117" : "#FFFFFF"; promise = dark ? "#2F5F8F" : "#9CC4E0"
array full[8] = [9, 11, 15, 5, 13, 2, 7, 3]   # filled markers
array open[8] = [8, 10, 15, 4, 12, 2, 6, 3]   # the same, open
array size[8] = [1.0, 1.0, 1.3, 1.1, 1.2, 1.0, 1.3, 1.2]
do for [m = 1:8] { size[m] = size[m] * markers }
array width[8] = [1.6, 1.6, 1, 1.8, 1.8, 1.6, 3.2, 1]

table(r, m) = sprintf("%s/%d_%d.dat", work, r, m + 0)
left = 0.112; right = 0.985; gap_x = 0.016
array top[2] = [0.785, 0.470]
height = 0.220
panel_width = (right - left + gap_x) / panels - gap_x

# Errors below are drawn at the floor: on a log scale an exact result has no place.
least = 1e-3
low = 0.7e-3
high = 1.5
clamp(y) = y < least ? least : (y > high ? high : y)

set multiplot
set label 1 sprintf("Rows and time against error: n = %s, head size %s, values ‘%s’, %d draws a point", n, dim, values, trials) \
  at screen 0.5, 0.975 center font ",17" tc rgb ink

# The legend has a strip of its own: what promises nothing, what promises, how to read a promise.
unset border; unset tics; unset key
set lmargin at screen 0; set rmargin at screen 1; set tmargin at screen 1; set bmargin at screen 0
set xrange [0:1]; set yrange [0:1]
legend_x(c) = c == 0 ? 0.075 : (c == 1 ? 0.365 : 0.675)
legend_y(i) = 0.930 - 0.023 * i
array heads[2] = ["{/:Bold promises nothing}", "{/:Bold promises ε with probability 1 − δ}"]
do for [c = 0:1] { set label 10 + c heads[c + 1] at screen legend_x(c) - 0.02, legend_y(0) left tc rgb ink }
do for [m = 1:8] {
  c = m <= 3 ? 0 : (m <= 7 ? 1 : 2)
  i = m == 8 ? 3 : (m <= 3 ? m : m - 3)
  if (m != 3 && m != 8) {
    set arrow 20 + m from screen legend_x(c) - 0.02, legend_y(i) to screen legend_x(c) + 0.02, legend_y(i) \
      nohead lc rgb colour[m] lw width[m]
  }
  set label 20 + m name[m] at screen legend_x(c), legend_y(i) left offset 3.2, -0.12 tc rgb ink \
    point pt full[m] ps 1.2 * size[m] lc rgb colour[m]
}
set arrow 31 from screen legend_x(2), legend_y(1) - 0.010 to screen legend_x(2), legend_y(1) + 0.008 \
  nohead lc rgb promise lw 1.6
set arrow 32 from screen legend_x(2) - 0.010, legend_y(1) + 0.008 to screen legend_x(2) + 0.010, legend_y(1) + 0.008 \
  nohead lc rgb colour[7] lw 2
set label 30 "ε, as vattention promised" at screen legend_x(2), legend_y(1) left offset 3.2, -0.12 tc rgb ink
set label 33 "broken: failures > δ" at screen legend_x(2), legend_y(2) left offset 3.2, -0.12 tc rgb ink \
  point pt 6 ps 1.5 * markers lc rgb frame lw 1.8
plot NaN notitle
unset label; unset arrow

set border 3 lc rgb frame
set logscale xy
set yrange [low:high]
set grid xtics ytics lc rgb faint lw 1 lt 1
set tics nomirror tc rgb ink
set mxtics 1

do for [what = 1:2] {
  if (what == 1) { set xrange [0.12:140] } else { set xrange [0.4:700] }
  if (what == 1) { set xtics ("0.2" 0.2, "1" 1, "5" 5, "20" 20, "100" 100) nomirror scale 0.6 }
  if (what == 2) { set xtics ("1×" 1, "10×" 10, "100×" 100) nomirror scale 0.6 }
  do for [r = 1:panels] {
    x0 = left + (r - 1) * (panel_width + gap_x)
    set lmargin at screen x0; set rmargin at screen x0 + panel_width
    set tmargin at screen top[what]; set bmargin at screen top[what] - height
    if (r == 1) {
      set ytics ("<0.1 %%" least, "0.3 %%" 0.003, "1 %%" 0.01, "3 %%" 0.03, "10 %%" 0.1, "30 %%" 0.3, "100 %%" 1) \
        nomirror scale 0.6
    } else {
      set ytics ("" least, "" 0.003, "" 0.01, "" 0.03, "" 0.1, "" 0.3, "" 1) nomirror scale 0.6
    }
    if (what == 1) { set label 2 word(regimes, r) at graph 0.5, 1.07 center font ",16" tc rgb ink }
    plot table(r, 7) using (column(what)):(clamp($3)):(0):(log10($4 / clamp($3)) > 0 ? $4 - clamp($3) : NaN) \
           with vectors nohead lc rgb promise lw 1.4, \
         table(r, 7) using (column(what) / 1.13):4:(column(what) * 0.26):(0) with vectors nohead lc rgb colour[7] lw 2, \
         for [m in "8 3 1 2 4 5 6 7"] table(r, m) using (column(what)):(clamp($3)) with lines lc rgb colour[m + 0] \
           lw width[m + 0], \
         for [m in "8 3 1 2 4 5 6 7"] table(r, m) using (column(what)):($5 == 0 ? clamp($3) : NaN) with points \
           pt full[m + 0] ps size[m + 0] lc rgb colour[m + 0], \
         for [m in "4 5 6 7"] table(r, m) using (column(what)):($5 == 1 ? clamp($3) : NaN) with points pt 7 \
           ps 1.5 * size[m + 0] lc rgb paper, \
         for [m in "4 5 6 7"] table(r, m) using (column(what)):($5 == 1 ? clamp($3) : NaN) with points pt open[m + 0] \
           ps 1.2 * size[m + 0] lc rgb colour[m + 0] lw 2
    unset label 2
  }
}

# Shared axis titles, drawn once.
unset border; unset tics; unset grid; unset logscale
set lmargin at screen 0; set rmargin at screen 1; set tmargin at screen 1; set bmargin at screen 0
set xrange [0:1]; set yrange [0:1]
set label 1 "relative error, 90 % quantile of the draws" at screen 0.016, (top[1] + top[2] - height) / 2 center rotate by 90 \
  tc rgb ink
set label 2 "rows read, % of the cache (further left is better)" at screen (left + right) / 2, top[1] - height - 0.052 center \
  tc rgb ink
set label 3 "speed of a step over dense, one thread (further right is better)" \
  at screen (left + right) / 2, top[2] - height - 0.052 center tc rgb ink
plot NaN notitle
unset label 1; unset label 2; unset label 3

# Was the promise kept?
if (judged > 0) {
  set border 3
  set lmargin at screen left; set rmargin at screen right; set tmargin at screen 0.130; set bmargin at screen 0.042
  set xrange [0.5:panels + 0.5]
  set yrange [-0.02:0.42]
  set grid ytics lc rgb faint lw 1 lt 1
  set tics nomirror
  set ytics ("0" 0, "20 %%" 0.2, "40 %%" 0.4) nomirror scale 0.6
  set xtics () nomirror scale 0
  do for [r = 1:panels] { set xtics add (word(regimes, r) r) }
  set label 1 sprintf("failures at the worst ε (share of draws with error > ε), with 95 %% intervals; dashed: δ = %g", delta) \
    at graph 0, 1.19 left tc rgb ink
  set arrow 1 from first 0.5, delta to first panels + 0.5, delta nohead dt 2 lw 1.6 lc rgb frame
  place(r, m) = r + 0.15 * (m - 5.5)
  above(y) = y > 0.41 ? 0.41 : y
  fails = work . "/failures.dat"
  plot for [m = 4:7] fails using ($2 == m ? place($1, m) : NaN):(above($3)):(above($4)):(above($5)) with yerrorbars \
    pt full[m] ps size[m] * 1.1 lc rgb colour[m] lw 2 notitle
}
unset multiplot
