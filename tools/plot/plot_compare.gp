# Selectors against each other, from the tables that tools/plot_compare makes in `work`; it sets the terminal too.

array name[14] = ["oracle", "codes_1", "codes_2", "codes_4", "codes_8", "product-codes_1", "product-codes_2", \
                  "pq-cache", "quest", "double-sparsity", "simhash", "magic-pig", "socket", "random"]
array colour[14] = ["#000000", "#9cc4e0", "#56B4E9", "#0072B2", "#003a5c", "#7fcf9f", "#009E73", \
                    "#c9a227", "#E69F00", "#D55E00", "#a0a0a0", "#CC79A7", "#8c5aa8", "#d0d0d0"]
array mark[14] = [3, 6, 6, 7, 7, 4, 5, 8, 9, 11, 10, 13, 12, 2]

there(s, i) = system(sprintf("test -s '%s/%s.%s' && echo 1 || echo 0", work, s, name[i])) + 0
table(s, i) = sprintf("%s/%s.%s", work, s, name[i])
label_of(i) = system(sprintf("echo '%s' | tr _ ' '", name[i]))

set multiplot layout 1, 3 title sprintf("Selectors by sampler: %s", source) font ",20" margins 0.07, 0.99, 0.27, 0.86 spacing 0.045
set logscale xy
set label 1 "red ring: failures of some head far beyond δ" at screen 0.99, 0.035 right font ",13" tc rgb "#c00000"
set xlabel "density: share of the rows that are read"
set ylabel "90 % error, relative to |o|"
set format x "%g"; set format y "%g"
set xrange [0.005:1.05]; set yrange [0.002:2]
set grid lc rgb "#e4e4e4" lt 1
set border 3 lc rgb "#606060"; set tics nomirror

do for [panel = 1:3] {
  s = panel == 1 ? "top-k" : (panel == 2 ? "uniform" : "importance")
  set title (panel == 1 ? "top-k alone (promises nothing)" : \
             panel == 2 ? "top-k and a uniform sample, verified" : "importance sampling, verified") font ",16"
  unset key
  if (panel == 2) { set key at screen 0.5, 0.15 center top maxrows 3 samplen 2 font ",13" }
  if (panel == 2) { unset ylabel }
  # An open ring around a point whose promise was broken for some head.
  plot for [i = 1:14] there(s, i) ? table(s, i) : "/dev/null" using 1:2 with linespoints lc rgb colour[i] lw 2 pt mark[i] \
         ps 0.9 title label_of(i), \
       for [i = 1:14] panel > 1 && there(s, i) ? table(s, i) : "/dev/null" using 1:($3 > 0 && $4 > 2.5 * delta ? $2 : NaN) \
         with points pt 6 ps 2.2 lc rgb "#c00000" lw 1.6 notitle
}
unset multiplot
