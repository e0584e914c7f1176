# Stated against observed, from the tables of tools/plot_calibration, which sets `work`.
cells = work . "/cells.dat"
pooled = work . "/pooled.dat"

set multiplot layout 1, 2 margins 0.07, 0.985, 0.12, 0.88 spacing 0.09
set border 3 lc rgb "#606060"
set grid lc rgb "#e4e4e4" lw 1 lt 1
set tics nomirror tc rgb "#303030"
set key top left reverse Left spacing 1.3

set title "Failures: share of draws with error > ε" font ",18"
set xlabel "δ, stated"
set ylabel "observed share"
set xrange [0:0.25]
set yrange [0:0.25]
# A little sideways noise keeps cells of one delta apart.
plot x with lines lw 2 lc rgb "#808080" title "failures = δ: the promise lies below", \
     cells using ($1 + 0.008 * (rand(0) - 0.5)):2 with points pt 7 ps 0.45 lc rgb "#9cc4e0" title "a cell (regime × values × ε)", \
     pooled using 1:2 with linespoints pt 7 ps 1.4 lw 2.5 lc rgb "#0072B2" title "all cells", \
     pooled using 1:3 with linespoints pt 5 ps 1.3 lw 2 lc rgb "#D55E00" title "all draws: error > the draw's own stated error"

set title "Achieved error: (1 − δ) quantile of a cell" font ",18"
set xlabel "(1 − δ) quantile that the certificates state, mean of the cell"
set ylabel "true (1 − δ) quantile"
set logscale xy
set xrange [1e-3:0.4]
set yrange [1e-3:0.4]
set xtics ("0.1 %%" 0.001, "0.5 %%" 0.005, "2 %%" 0.02, "5 %%" 0.05, "10 %%" 0.1, "20 %%" 0.2)
set ytics ("0.1 %%" 0.001, "0.5 %%" 0.005, "2 %%" 0.02, "5 %%" 0.05, "10 %%" 0.1, "20 %%" 0.2)
plot x with lines lw 2 lc rgb "#808080" title "stated = true: honest below", \
     x / 2 with lines dt 2 lw 1.5 lc rgb "#808080" title "stated = 2 × true", \
     cells using 5:4 with points pt 7 ps 0.5 lc rgb "#0072B2" title "a cell"
unset multiplot
