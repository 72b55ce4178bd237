package place

import (
	"fmt"
	"io"
	"math"
	"slices"
	"strings"

	"github.com/cairnstore/cairn/placement"
)

// Contenders are what a trace is replayed under, by name: the production's
// policies and the rivals.
func Contenders() (names []string) {
	for _, p := range placement.Policies {
		names = append(names, string(p))
	}
	for _, v := range Rivals {
		names = append(names, string(v))
	}
	return names
}

// Compare replays one trace under each of the named contenders, rivals only where
// VMs churn, and calls done after each. The same seed gives the same results.
func Compare(t *Trace, names []string, done func(*Result)) error {
	for _, name := range names {
		c := Config{Sample: placement.SampleHosts, Seed: t.Seed}
		switch {
		case !slices.Contains(Rivals, Rival(name)):
			p, err := placement.ParsePolicy(name)
			if err != nil {
				return err
			}
			c.Policy = p
		case strings.HasPrefix(t.Name, "churn"):
			c.Rival = Rival(name)
		default:
			continue
		}
		r, err := Replay(t, c)
		if err != nil {
			return err
		}
		done(r)
	}
	return nil
}

// Header names the columns of Row.
var Header = []string{"HOSTS", "TRACE", "POLICY", "VMS", "REFUSED", "FIRST REFUSAL", "HOSTS ÷ BOUND", "LOCAL", "OF BEST", "BEFORE", "MOVES/VM", "FORCED", "HOMELESS", "MOVED"}

// Row is a result as a table shows it.
func (r *Result) Row() []string {
	pct := func(f float64) string { return fmt.Sprintf("%.1f %%", 100*f) }
	opt := func(show bool, s string) string {
		if show {
			return s
		}
		return "-"
	}
	return []string{fmt.Sprint(r.Hosts), r.Trace, r.Policy, fmt.Sprint(r.Asked), fmt.Sprint(r.Refused),
		opt(r.Refused > 0, fmt.Sprintf("at %.3f", r.FirstRefusal)), fmt.Sprintf("%.3f", float64(r.HostsUsed)/float64(max(r.Bound, 1))),
		pct(r.Local), pct(r.Locality), opt(r.LocalityFirst >= 0, pct(r.LocalityFirst)), opt(r.LocalityFirst >= 0, fmt.Sprintf("%.3f", r.MovesPerVM())),
		opt(r.Forced > 0, fmt.Sprint(r.Forced)), opt(r.Forced > 0, fmt.Sprint(r.Homeless)), opt(r.DataMoved > 0, placement.Bytes(uint64(r.DataMoved)))}
}

// Markdown writes results as a table of a document.
func Markdown(w io.Writer, rs []*Result) error {
	var b strings.Builder
	b.WriteString("| " + strings.ToLower(strings.Join(Header, " | ")) + " |\n|" + strings.Repeat("---|", len(Header)) + "\n")
	for _, r := range rs {
		b.WriteString("| " + strings.Join(r.Row(), " | ") + " |\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// bar is one bar of a plot.
type bar struct {
	label string
	value float64
}

// Plot draws one figure of every policy's result on the traces of one size, as
// groups of bars in an SVG; no other file is needed to show it.
func Plot(w io.Writer, title, unit string, rs []*Result, hosts int, figure func(*Result) (float64, bool)) error {
	groups, order := map[string][]bar{}, []string{}
	for _, r := range rs {
		v, ok := figure(r)
		if r.Hosts != hosts || !ok {
			continue
		}
		if groups[r.Trace] == nil {
			order = append(order, r.Trace)
		}
		groups[r.Trace] = append(groups[r.Trace], bar{r.Policy, v})
	}
	_, err := io.WriteString(w, drawBars(title, unit, order, groups))
	return err
}

// colours are told apart by most colour-blind people (Okabe and Ito 2008).
var colours = []string{"#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999"}

// Measures of a plot in pixels.
const (
	plotLeft, plotTop, plotHeight = 60, 40, 220
	barWide, groupGap             = 14, 24
)

func drawBars(title, unit string, order []string, groups map[string][]bar) string {
	top, names := 0.0, []string{}
	index := map[string]int{}
	for _, g := range order {
		for _, b := range groups[g] {
			top = math.Max(top, b.value)
			if _, ok := index[b.label]; !ok {
				index[b.label] = len(names)
				names = append(names, b.label)
			}
		}
	}
	if top == 0 {
		top = 1
	}
	var body strings.Builder
	x := plotLeft + groupGap
	for _, g := range order {
		first := x
		for _, b := range groups[g] {
			h := b.value / top * plotHeight
			fmt.Fprintf(&body, `<rect x="%d" y="%.1f" width="%d" height="%.1f" fill="%s"><title>%s, %s: %.3f %s</title></rect>`+"\n",
				x, plotTop+plotHeight-h, barWide-2, h, colours[index[b.label]%len(colours)], g, b.label, b.value, unit)
			x += barWide
		}
		fmt.Fprintf(&body, `<text x="%d" y="%d" text-anchor="middle">%s</text>`+"\n", (first+x)/2, plotTop+plotHeight+16, g)
		x += groupGap
	}
	width := max(x+20, 640)
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="11">`+"\n<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n", width, plotTop+plotHeight+60)
	fmt.Fprintf(&b, `<text x="%d" y="20" font-size="14">%s</text>`+"\n", plotLeft, title)
	for i := range 5 {
		v := top * float64(i) / 4
		y := plotTop + plotHeight - float64(i)*plotHeight/4
		fmt.Fprintf(&b, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#ddd"/><text x="%d" y="%.1f" text-anchor="end">%.3g %s</text>`+"\n", plotLeft, width-10, y, y, plotLeft-6, y+4, v, unit)
	}
	b.WriteString(body.String())
	x = plotLeft
	for i, n := range names {
		fmt.Fprintf(&b, `<rect x="%d" y="%d" width="10" height="10" fill="%s"/><text x="%d" y="%d">%s</text>`+"\n", x, plotTop+plotHeight+34, colours[i%len(colours)], x+14, plotTop+plotHeight+43, n)
		x += 30 + 7*len(n)
	}
	return b.String() + "</svg>\n"
}

// Figures are the plots of the report, by file name.
var Figures = map[string]struct {
	Title, Unit string
	Of          func(*Result) (float64, bool)
}{
	"locality": {"Traffic served locally, of what the best host of each VM would serve", "%", func(r *Result) (float64, bool) { return 100 * r.Locality, true }},
	"packing": {"Hosts in use beyond the lower bound", "%", func(r *Result) (float64, bool) {
		return 100 * (float64(r.HostsUsed)/float64(max(r.Bound, 1)) - 1), r.Policy == "min" || r.Policy == "balanced"
	}},
	"refusals": {"VMs refused, of a thousand", "‰", func(r *Result) (float64, bool) {
		return 1000 * float64(r.Refused) / float64(max(r.Asked, 1)), strings.HasPrefix(r.Trace, "churn")
	}},
	"moves": {"Moves of rebalancing for every ten VMs", "", func(r *Result) (float64, bool) {
		return 10 * r.MovesPerVM(), r.LocalityFirst >= 0 && r.Policy == string(placement.NearData)
	}},
}
