# A model's answers by epsilon and by density, from the tables that tools/plot_llama makes in `work`; it sets the
# terminal too.

array colour[6] = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
array mark[6] = [7, 5, 9, 11, 13, 15]
array method[4] = ["vattention", "top-k", "sample", "sinks-window"]
array shown[4] = ["vattention", "top-k", "uniform sample", "sinks + window"]
array method_colour[4] = ["#0072B2", "#E69F00", "#009E73", "#56B4E9"]
array method_mark[4] = [7, 9, 11, 15]

there(name) = system(sprintf("test -s '%s/%s' && echo 1 || echo 0", work, name)) + 0
table(name) = there(name) ? sprintf("%s/%s", work, name) : "/dev/null"

set multiplot layout 1, 3 title sprintf("A trained model at %s tokens: answers by error allowed, and by rows read", len) \
  font ",20" margins 0.06, 0.985, 0.27, 0.84 spacing 0.06
set border 3 lc rgb "#606060"; set tics nomirror
set grid lc rgb "#e4e4e4" lt 1
set logscale x
set key at graph 0.5, -0.2 center top horizontal maxcols 2 samplen 2.5 font ",14"

set xlabel sprintf("ε allowed (δ = %g)", delta)
set xtics (0.02, 0.05, 0.1, 0.2, 0.4)
set xrange [0.017:0.47]
set title "accuracy (dashed: dense)" font ",16"
set yrange [0:1.05]
plot for [i = 1:words(tasks)] table("task." . word(tasks, i)) using 1:2 with linespoints lc rgb colour[i] lw 2.4 \
       pt mark[i] ps 1.2 title word(tasks, i), \
     for [i = 1:words(tasks)] dense_of[i] with lines dt 2 lw 1.2 lc rgb colour[i] notitle

set title "density: share of the rows that are read" font ",16"
set logscale y
set yrange [0.003:1.2]
set format y "%g"
plot for [i = 1:words(tasks)] table("task." . word(tasks, i)) using 1:3 with linespoints lc rgb colour[i] lw 2.4 \
       pt mark[i] ps 1.2 title word(tasks, i)

unset logscale y
set title "accuracy over all tasks, by density" font ",16"
set xlabel "density"
set xtics (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
set xrange [0.006:1.1]
set yrange [0:1.05]
set key at screen 0.84, 0.155 center top vertical maxrows 3 samplen 1.5 font ",14"
plot for [i = 1:4] table("method." . method[i]) using 1:2 with linespoints lc rgb method_colour[i] lw 2.4 \
       pt method_mark[i] ps 1.3 title shown[i], \
     dense with lines dt 2 lw 1.4 lc rgb "#000000" title "dense"
unset multiplot
