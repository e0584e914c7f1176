# Sparsity against error, from the tables of sweep_tables.awk. Called by tools/plot_sweep, which sets
# `work` (their folder), the terminal and the output.

# Okabe and Ito's palette: told apart with any colour vision, and by marker in grey.
array name[7] = ["top-k", "uniform sample", "sinks + window", "paper (verified denominator)", \
                 "verified SDPA", "vattention (output)", "dense"]
array colour[7] = ["#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7", "#0072B2", "#000000"]
array full[7] = [9, 11, 15, 5, 13, 7, 3]   # filled markers
array open[7] = [8, 10, 15, 4, 12, 6, 3]   # the same, open
array size[7] = [1.0, 1.0, 1.3, 1.1, 1.2, 1.3, 1.2]
array width[7] = [1.6, 1.6, 1, 1.8, 1.8, 3, 1]

table(r, m) = sprintf("%s/%d_%d.dat", work, r, m + 0)
cols = 4
rows = (panels + cols - 1) / cols
left = 0.082; right = 0.988; top = 0.826; bottom = 0.335; gap_x = 0.014; gap_y = 0.075
if (rows == 1) { bottom = 0.50 }
panel_width = (right - left + gap_x) / cols - gap_x
panel_height = (top - bottom + gap_y) / rows - gap_y

# Errors below are drawn at the floor: on a log scale an exact result has no place.
least = 1e-3
low = 0.7e-3
high = 1.5
clamp(y) = y < least ? least : (y > high ? high : y)

set multiplot
set label 1 sprintf("Sparsity against error: n = %s, head size %s, values ‘%s’, %d draws a point", n, dim, values, trials) \
  at screen 0.5, 0.975 center font ",21"

# The legend has a strip of its own: what promises nothing, what promises, how to read a promise.
unset border; unset tics; unset key
set lmargin at screen 0; set rmargin at screen 1; set tmargin at screen 1; set bmargin at screen 0
set xrange [0:1]; set yrange [0:1]
legend_x(c) = 0.105 + 0.30 * c
legend_y(i) = 0.918 - 0.023 * i
array heads[3] = ["{/:Bold promises nothing}", "{/:Bold promises ε with probability 1 − δ}", ""]
do for [c = 0:1] { set label 10 + c heads[c + 1] at screen legend_x(c) - 0.02, legend_y(-1) left }
do for [m = 1:7] {
  c = m <= 3 ? 0 : (m <= 6 ? 1 : 2)
  i = m == 7 ? 2 : (m - 1) % 3
  if (m != 3 && m != 7) {
    set arrow 20 + m from screen legend_x(c) - 0.02, legend_y(i) to screen legend_x(c) + 0.02, legend_y(i) \
      nohead lc rgb colour[m] lw width[m]
  }
  set label 20 + m name[m] at screen legend_x(c), legend_y(i) left offset 3.2, -0.12 \
    point pt full[m] ps 1.3 * size[m] lc rgb colour[m]
}
set arrow 31 from screen legend_x(2), legend_y(0) - 0.008 to screen legend_x(2), legend_y(0) + 0.008 \
  nohead lc rgb "#9cc4e0" lw 1.4
set arrow 32 from screen legend_x(2) - 0.008, legend_y(0) + 0.008 to screen legend_x(2) + 0.008, legend_y(0) + 0.008 \
  nohead lc rgb colour[6] lw 2
set label 30 "ε that vattention promised" at screen legend_x(2), legend_y(0) left offset 3.6, -0.12
set label 33 "promise broken (failures > δ)" at screen legend_x(2), legend_y(1) left offset 3.2, -0.12 \
  point pt 6 ps 1.5 lc rgb "#404040" lw 1.8
plot NaN notitle
unset label; unset arrow

set border 3 lc rgb "#606060"
set logscale xy
set xrange [0.12:140]
set yrange [low:high]
set grid xtics ytics lc rgb "#e4e4e4" lw 1 lt 1
set tics nomirror tc rgb "#303030"
set xtics ("0.2" 0.2, "1" 1, "5" 5, "20" 20, "100" 100) nomirror scale 0.6
set mxtics 1

do for [r = 1:panels] {
  col = (r - 1) % cols
  row = (r - 1) / cols
  x0 = left + col * (panel_width + gap_x)
  y1 = top - row * (panel_height + gap_y)
  set lmargin at screen x0; set rmargin at screen x0 + panel_width
  set tmargin at screen y1; set bmargin at screen y1 - panel_height
  if (col == 0) {
    set ytics ("<0.1 %%" least, "0.3 %%" 0.003, "1 %%" 0.01, "3 %%" 0.03, "10 %%" 0.1, "30 %%" 0.3, "100 %%" 1) nomirror scale 0.6
  } else {
    set ytics ("" least, "" 0.003, "" 0.01, "" 0.03, "" 0.1, "" 0.3, "" 1) nomirror scale 0.6
  }
  set label 2 word(regimes, r) at graph 0.5, 1.06 center font ",17" tc rgb "#202020"
  plot table(r, 6) using 1:(clamp($2)):(0):(log10($3 / clamp($2)) > 0 ? $3 - clamp($2) : NaN) \
         with vectors nohead lc rgb "#9cc4e0" lw 1.4, \
       table(r, 6) using ($1 / 1.12):3:($1 * 0.24):(0) with vectors nohead lc rgb colour[6] lw 2, \
       for [m in "7 3 1 2 4 5 6"] table(r, m) using 1:(clamp($2)) with lines lc rgb colour[m + 0] lw width[m + 0], \
       for [m in "7 3 1 2 4 5 6"] table(r, m) using 1:($4 == 0 ? clamp($2) : NaN) with points pt full[m + 0] ps size[m + 0] \
         lc rgb colour[m + 0], \
       for [m in "4 5 6"] table(r, m) using 1:($4 == 1 ? clamp($2) : NaN) with points pt 7 ps 1.5 * size[m + 0] \
         lc rgb "white", \
       for [m in "4 5 6"] table(r, m) using 1:($4 == 1 ? clamp($2) : NaN) with points pt open[m + 0] \
         ps 1.2 * size[m + 0] lc rgb colour[m + 0] lw 2
  unset label 2
}

# Shared axis titles, drawn once.
unset border; unset tics; unset grid; unset logscale
set lmargin at screen 0; set rmargin at screen 1; set tmargin at screen 1; set bmargin at screen 0
set xrange [0:1]; set yrange [0:1]
set label 1 "relative error, 90 % quantile of the draws" at screen 0.010, (top + bottom) / 2 center rotate by 90
set label 2 "density: rows read, % of the cache" at screen (left + right) / 2, bottom - 0.052 center
plot NaN notitle
unset label 1; unset label 2

# Was the promise kept?
if (judged > 0) {
  set border 3
  set lmargin at screen left; set rmargin at screen right; set tmargin at screen 0.215; set bmargin at screen 0.05
  set xrange [0.5:panels + 0.5]
  set yrange [-0.04:1.04]
  set grid ytics lc rgb "#e4e4e4" lw 1 lt 1
  set tics nomirror
  set ytics ("0" 0, "25 %%" 0.25, "50 %%" 0.5, "75 %%" 0.75, "100 %%" 1) nomirror scale 0.6
  set xtics () nomirror scale 0
  do for [r = 1:panels] { set xtics add (word(regimes, r) r) }
  set label 1 "failures at the worst ε (error > ε), with 95 % intervals" at graph 0, 1.13 left font ",16"
  set label 2 sprintf("δ = %g", delta) at first panels + 0.48, delta + 0.08 right
  set arrow 1 from first 0.5, delta to first panels + 0.5, delta nohead dt 2 lw 1.6 lc rgb "#404040"
  place(r, m) = r + 0.18 * (m - 5)
  fails = work . "/failures.dat"
  plot for [m = 4:6] fails using ($2 == m ? place($1, m) : NaN):3:4:5 with yerrorbars pt full[m] ps size[m] * 1.15 \
    lc rgb colour[m] lw 2 notitle
}
unset multiplot
