package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/netplane"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// netView is the storage network as `cairn net show -o json` shows it.
type netView struct {
	Problems []string    `json:"problems"`
	Hosts    []netReport `json:"hosts"`
	Silent   []string    `json:"silent"` // hosts that gave no answer
	Reach    []reachView `json:"reach"`

	names map[string]string // host by data address
}

// reachView is one path of one host to another.
type reachView struct {
	From   string  `json:"from"`
	To     string  `json:"to"`
	Path   string  `json:"path"` // stable, or a spine
	Alive  bool    `json:"alive"`
	RTTus  float64 `json:"rttUs"`
	Packet int     `json:"packetBytes"`
	Conns  int     `json:"connections"`
}

// netReports asks hosts (all, or those named) for their network; hosts that do
// not answer are left out, unless they were named.
func (s *session) netReports(ctx context.Context, only []string) ([]netReport, error) {
	w, err := s.netView(ctx)
	if err != nil {
		return nil, err
	}
	var out []netReport
	for _, r := range w.Hosts {
		if len(only) == 0 || slices.Contains(only, r.Host) {
			out = append(out, r)
		}
	}
	for _, n := range only {
		if !slices.ContainsFunc(out, func(r netReport) bool { return r.Host == n }) {
			return nil, status.Errorf(status.Unavailable, "host %q does not answer, or there is none: `cairn host ls` lists them", n)
		}
	}
	return out, nil
}

// netView gathers what all hosts say.
func (s *session) netView(ctx context.Context) (*netView, error) {
	hosts, err := s.hosts(ctx)
	if err != nil {
		return nil, err
	}
	w := &netView{Problems: []string{}, Hosts: []netReport{}, Silent: []string{}, Reach: []reachView{}, names: map[string]string{}}
	reports := make([]*netReport, len(hosts))
	var wg sync.WaitGroup
	for i, h := range hosts {
		w.names[h.Host.DataAddr] = h.Host.Name
		wg.Go(func() {
			r := &netReport{}
			if askNet(ctx, h.Host, r, func(ctx context.Context, c pb.HostControlClient) (*pb.NetReply, error) {
				return c.NetReport(ctx, &pb.NetRequest{})
			}) == nil {
				reports[i] = r
			}
		})
	}
	wg.Wait()
	for i, r := range reports {
		if r == nil {
			w.Silent = append(w.Silent, hosts[i].Host.Name)
		} else {
			w.Hosts = append(w.Hosts, *r)
		}
	}
	slices.SortFunc(w.Hosts, func(a, b netReport) int { return cmp.Compare(a.Host, b.Host) })
	w.diagnose()
	return w, nil
}

// diagnose fills in who reaches whom, and what is wrong.
func (w *netView) diagnose() {
	var sights []netplane.Sight
	var cuts []netplane.Cut
	for _, r := range w.Hosts {
		routed := map[string]bool{}
		if r.Network != nil {
			for _, l := range r.Network.Links {
				switch {
				case !l.Up:
					cuts = append(cuts, netplane.Cut{Host: r.Host, Spine: l.To, Link: l.Name, Why: "switched off"})
				case !l.Carrier:
					cuts = append(cuts, netplane.Cut{Host: r.Host, Spine: l.To, Link: l.Name, Why: "without carrier"})
				}
			}
			for _, x := range r.Network.Sessions {
				for _, l := range r.Network.Links {
					if x.Info == "Established" && strings.HasPrefix(x.Name, "to_"+strings.ReplaceAll(l.To, "-", "_")+"_") {
						routed[l.To] = true
					}
				}
			}
			for _, p := range r.Network.Problems {
				if !strings.HasPrefix(p, "link ") { // those are told as cuts
					w.Problems = append(w.Problems, fmt.Sprintf("network of host %s: %s", r.Host, p))
				}
			}
		}
		for _, p := range r.Paths {
			to := w.names[p.Peer]
			if to == "" || to == r.Host {
				continue
			}
			w.Reach = append(w.Reach, reachView{r.Host, to, p.Name, p.Alive, float64(p.RTT.Microseconds()), p.Packet, p.Conns})
			if p.Name != "stable" {
				sights = append(sights, netplane.Sight{From: r.Host, To: to, Spine: p.Name, Alive: p.Alive, Routed: routed[p.Name]})
			}
		}
	}
	slices.SortFunc(w.Reach, func(a, b reachView) int {
		return cmp.Or(cmp.Compare(a.From, b.From), cmp.Compare(a.To, b.To), cmp.Compare(b2i(b.Path == "stable"), b2i(a.Path == "stable")), cmp.Compare(a.Path, b.Path))
	})
	w.Problems = append(w.Problems, netplane.Diagnose(sights, cuts)...)
}

func netCommand(c *cli) *cobra.Command {
	cmd := &cobra.Command{Use: "net", Short: "The storage network"}
	cmd.AddCommand(netShowCommand(c), netRunCommand(), netLabCommand(c))
	return cmd
}

func netShowCommand(c *cli) *cobra.Command {
	var out outputFlag
	var svg string
	cmd := &cobra.Command{
		Use: "show", Short: "Show the storage network: links, sessions, next hops, and who reaches whom",
		Example: "  cairn net show\n  cairn net show --svg network.svg",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				w, err := s.netView(ctx)
				if err != nil {
					return err
				}
				if svg != "" {
					if err := writeFile(svg, []byte(w.svg())); err != nil {
						return fmt.Errorf("cannot write the picture: %w", err)
					}
				}
				if out.format != "table" {
					return out.show(w, nil, nil)
				}
				return w.print()
			})
		},
	}
	cmd.Flags().StringVar(&svg, "svg", "", "also draw it into this file")
	out.register(cmd)
	return cmd
}

func (w *netView) print() error {
	if len(w.Problems) == 0 {
		fmt.Println("the storage network is well")
	}
	for _, p := range w.Problems {
		fmt.Println("! " + p)
	}
	for _, h := range w.Silent {
		fmt.Printf("! host %s does not answer\n", h)
	}
	var links, sessions, hops [][]string
	for _, r := range w.Hosts {
		if r.Network == nil {
			continue
		}
		for _, l := range r.Network.Links {
			state := "up"
			if !l.Up {
				state = "off"
			} else if !l.Carrier {
				state = "no carrier"
			}
			links = append(links, []string{r.Host, l.Name, l.To, state, strings.Join(l.Addrs, " ")})
		}
		for _, x := range r.Network.Sessions {
			sessions = append(sessions, []string{r.Host, x.Name, x.Kind, x.State, x.Since, dash(x.Info)})
		}
		for _, rt := range r.Network.Routes {
			hops = append(hops, []string{r.Host, rt.To, rt.Owner, strings.Join(rt.Hops, ", ")})
		}
	}
	for _, t := range []struct {
		header []string
		rows   [][]string
	}{{[]string{"HOST", "LINK", "TO", "IS", "ADDRESSES"}, links}, {[]string{"HOST", "SESSION", "KIND", "IS", "SINCE", "SAYS"}, sessions},
		{[]string{"HOST", "TO", "OWNER", "NEXT HOPS"}, hops}} {
		if len(t.rows) > 0 {
			fmt.Println()
			if err := printTable(t.header, t.rows); err != nil {
				return err
			}
		}
	}
	if len(w.Reach) == 0 {
		return nil
	}
	fmt.Println()
	return printTable(w.reachTable())
}

// reachTable has a row for each pair of hosts and a column for each path.
func (w *netView) reachTable() (header []string, rows [][]string) {
	paths := map[string]bool{}
	for _, r := range w.Reach {
		paths[r.Path] = true
	}
	names := slices.SortedFunc(maps.Keys(paths), func(a, b string) int {
		return cmp.Or(cmp.Compare(b2i(b == "stable"), b2i(a == "stable")), cmp.Compare(a, b))
	})
	header = []string{"FROM", "TO"}
	for _, n := range names {
		header = append(header, strings.ToUpper(n))
	}
	var row []string
	for _, r := range w.Reach {
		if row == nil || row[0] != r.From || row[1] != r.To {
			row = append([]string{r.From, r.To}, slices.Repeat([]string{"-"}, len(names))...)
			rows = append(rows, row)
		}
		cell := "dead"
		if r.Alive {
			cell = fmt.Sprintf("%.0f µs", r.RTTus)
			if r.Packet > 0 {
				cell += fmt.Sprintf(", ≤ %d B", r.Packet)
			}
		}
		if r.Conns > 0 {
			cell += fmt.Sprintf(", %d in use", r.Conns)
		}
		row[2+slices.Index(names, r.Path)] = cell
	}
	return header, rows
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// Measures of the picture, in its own units.
const (
	svgStep = 170
	svgTop  = 60
	svgDown = 260
	svgBox  = 120
)

// svg draws spines above, hosts below and the links between: green works, red
// does not, grey is not known.
func (w *netView) svg() string {
	spines := map[string]bool{}
	state := map[[2]string]string{}
	for _, r := range w.Hosts {
		if r.Network != nil {
			for _, l := range r.Network.Links {
				spines[l.To] = true
				state[[2]string{r.Host, l.To}] = color(l.Up && l.Carrier)
			}
		}
	}
	for _, r := range w.Reach {
		if r.Path == "stable" {
			continue
		}
		spines[r.Path] = true
		// A link is good as soon as one path over it is, and its own state is.
		for _, h := range []string{r.From, r.To} {
			k := [2]string{h, r.Path}
			if _, known := state[k]; !known {
				state[k] = color(r.Alive)
			}
		}
	}
	for k := range state {
		seen, alive := 0, 0
		for _, r := range w.Reach {
			if r.Path == k[1] && (r.From == k[0] || r.To == k[0]) {
				seen++
				alive += b2i(r.Alive)
			}
		}
		if seen > 0 && alive == 0 {
			state[k] = color(false)
		}
	}
	hosts := append([]string(nil), w.Silent...)
	for _, r := range w.Hosts {
		hosts = append(hosts, r.Host)
	}
	slices.Sort(hosts)
	top := slices.Sorted(maps.Keys(spines))
	wide := max(len(hosts), len(top), 1) * svgStep
	x := func(i, n int) int { return wide * (2*i + 1) / (2 * n) }
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="14" text-anchor="middle">`+"\n", wide, svgDown+svgTop)
	for i, h := range hosts {
		for j, s := range top {
			fmt.Fprintf(&b, `<line x1="%d" y1="%d" x2="%d" y2="%d" stroke="%s" stroke-width="3"/>`+"\n",
				x(i, len(hosts)), svgDown, x(j, len(top)), svgTop, cmp.Or(state[[2]string{h, s}], "#999"))
		}
	}
	box := func(x, y int, name, fill string) {
		fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%d" height="40" rx="6" fill="%s" stroke="#333"/><text x="%d" y="%d">%s</text>`+"\n",
			x-svgBox/2, y-20, svgBox, fill, x, y+5, name)
	}
	for j, s := range top {
		box(x(j, len(top)), svgTop, s, "#eef")
	}
	for i, h := range hosts {
		fill := "#efe"
		if slices.Contains(w.Silent, h) {
			fill = "#fdd"
		}
		box(x(i, len(hosts)), svgDown, h, fill)
	}
	b.WriteString("</svg>\n")
	return b.String()
}

func color(good bool) string {
	if good {
		return "#2a2"
	}
	return "#c22"
}
