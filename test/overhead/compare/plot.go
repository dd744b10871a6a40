package main

import (
	"image/color"
	"math"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
)

// dot is a figure with its quartiles.
type dot struct {
	name           string
	low, mid, high float64
}

// dotOf makes a dot of values.
func dotOf(name string, values []float64) dot {
	return dot{name, quantile(values, 0.25), middle(values), quantile(values, 0.75)}
}

// plotDots draws figures one below the other on a logarithmic axis. What is not
// more than least is drawn there.
func plotDots(path, title, axis string, least float64, dots []dot) error {
	p := plot.New()
	p.Title.Text, p.X.Label.Text = title, axis
	p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
	points, names := make(plotter.XYs, len(dots)), make([]string, len(dots))
	errs := make(plotter.XErrors, len(dots))
	most := least
	for i, d := range dots {
		row := len(dots) - 1 - i
		names[row] = d.name
		points[row] = plotter.XY{X: max(least, d.mid), Y: float64(row)}
		errs[row].Low = max(least, d.low) - points[row].X
		errs[row].High = max(least, d.high) - points[row].X
		most = max(most, d.high, d.mid)
	}
	scatter, err := plotter.NewScatter(points)
	if err != nil {
		return err
	}
	scatter.Shape, scatter.Radius, scatter.Color = plotutil.Shape(5), vg.Points(4), color.RGBA{B: 160, A: 255}
	bars, err := plotter.NewXErrorBars(struct {
		plotter.XYs
		plotter.XErrors
	}{points, errs})
	if err != nil {
		return err
	}
	p.Add(plotter.NewGrid(), bars, scatter)
	p.NominalY(names...)
	p.X.Min, p.X.Max = least, math.Pow(10, math.Ceil(math.Log10(most)+0.01))
	return p.Save(18*vg.Centimeter, vg.Length(len(dots)+3)*0.8*vg.Centimeter, path)
}
