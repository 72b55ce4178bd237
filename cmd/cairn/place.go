package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

func placeCommand(c *cli) *cobra.Command {
	cmd := &cobra.Command{Use: "place", Short: "Placement: why something goes where, and what moving it costs"}
	cmd.AddCommand(placeExplain(c), placePolicy(c), placeRebalance(c), placeSimulate())
	return cmd
}

// explainView is an explanation as `-o json` shows it.
type explainView struct {
	VM     string      `json:"vm"`
	Host   string      `json:"host"`   // where it would go now; empty: it would wait
	Reason string      `json:"reason"` // why there, or what it would wait for
	Scores []scoreView `json:"scores"` // the best first, those that do not fit last
	Steps  []stepView  `json:"steps"`  // of one that has a host, the cheapest first
}

type scoreView struct {
	Host    string             `json:"host"`
	Refused string             `json:"refused,omitempty"` // why it does not fit
	Sum     float64            `json:"sum"`               // of weight × value
	Values  map[string]float64 `json:"values"`
	Weights map[string]float64 `json:"weights"`
}

type stepView struct {
	Step       string  `json:"step"`
	Host       string  `json:"host"`
	Once       float64 `json:"onceBytes"`
	Network    float64 `json:"networkBytes"`
	Impossible string  `json:"impossible,omitempty"` // why
	Chosen     bool    `json:"chosen"`
}

func viewExplain(vm string, ans *pb.PlaceAnswer) explainView {
	v := explainView{VM: vm, Host: ans.Host, Reason: ans.Reason, Scores: []scoreView{}, Steps: []stepView{}}
	for _, s := range ans.Scores {
		x := scoreView{Host: s.Host, Refused: s.Refused, Sum: s.Sum, Values: map[string]float64{}, Weights: map[string]float64{}}
		for _, t := range s.Terms {
			x.Values[t.Name], x.Weights[t.Name] = t.Value, t.Weight
		}
		v.Scores = append(v.Scores, x)
	}
	for _, s := range ans.Steps {
		v.Steps = append(v.Steps, stepView{s.Step, s.Host, s.OnceBytes, s.NetworkBytes, s.Impossible, s.Chosen})
	}
	return v
}

func placeExplain(c *cli) *cobra.Command {
	var out outputFlag
	cmd := &cobra.Command{
		Use: "explain VM", Short: "Say where a VM would go now, how every host scores, and what staying and moving cost", Args: cobra.ExactArgs(1),
		Example: "  cairn place explain web\n  cairn place explain web -o json | jq .scores",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := out.check(); err != nil {
				return err
			}
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				ans, err := s.place(ctx, &pb.PlaceQuestion{Vm: args[0]})
				if err != nil {
					return err
				}
				if out.format == "json" {
					return out.show(viewExplain(args[0], ans), nil, nil)
				}
				fmt.Print(ans.Text)
				return nil
			})
		},
	}
	out.register(cmd)
	return cmd
}

// place asks the metadata leader about placement.
func (s *session) place(ctx context.Context, q *pb.PlaceQuestion) (*pb.PlaceAnswer, error) {
	rep, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Place{Place: q}})
	if err != nil {
		return nil, err
	}
	if rep.Place == nil {
		return nil, status.Errorf(status.Internal, "metadata answered a question about placement with nothing")
	}
	return rep.Place, nil
}

// policyView is the placement policy as `-o json` shows it.
type policyView struct {
	Policy    string             `json:"policy"`
	Order     string             `json:"order"`
	AgeMs     int64              `json:"ageMs"`
	QuantumMs int64              `json:"quantumMs"`
	DelayMs   int64              `json:"delayMs"`
	RestartMs int64              `json:"restartMs"` // -1: never
	Rebalance string             `json:"rebalance"` // off, data, all
	Moves     uint32             `json:"movesAtOnce"`
	Bytes     uint64             `json:"bytesAtOnce"`
	CoolMs    int64              `json:"coolAfterMs"` // -1: never
	CoolAbove uint32             `json:"coolAbovePercent"`
	Weights   map[string]float64 `json:"weights"`
}

func placePolicy(c *cli) *cobra.Command {
	var out outputFlag
	var age, quantum, delay, restart, cool time.Duration
	var policy, order, rebalance, bytes string
	var moves, above uint32
	var weights map[string]string
	cmd := &cobra.Command{
		Use: "policy", Short: "Show or set the cluster's placement policy and the order of the queue", Args: cobra.NoArgs,
		Example: "  cairn place policy\n  cairn place policy --policy local --order sjf --age 30m\n  cairn place policy --order round-robin --weight red=2 --weight blue=1\n  cairn place policy --restart-after 1m --rebalance all --moves-at-once 2",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				ans, err := s.place(ctx, &pb.PlaceQuestion{Settings: true})
				if err != nil {
					return err
				}
				p := ans.Settings
				set := cmd.Flags().Changed
				changed := false
				for _, f := range []string{"policy", "order", "age", "quantum", "delay", "weight", "restart-after", "rebalance", "moves-at-once", "bytes-at-once", "cool-after", "cool-above"} {
					changed = changed || set(f)
				}
				if !changed {
					return out.showPolicy(p)
				}
				for _, f := range []struct {
					flag string
					put  func()
				}{
					{"policy", func() { p.Policy = policy }}, {"order", func() { p.Order = order }},
					{"age", func() { p.AgeMs = age.Milliseconds() }}, {"quantum", func() { p.QuantumMs = quantum.Milliseconds() }},
					{"delay", func() { p.DelayMs = delay.Milliseconds() }}, {"restart-after", func() { p.RestartMs = restart.Milliseconds() }},
					{"rebalance", func() { p.Rebalance = rebalance }}, {"moves-at-once", func() { p.MovesAtOnce = moves }},
					{"cool-after", func() { p.CoolMs = cool.Milliseconds() }}, {"cool-above", func() { p.CoolPercent = above }},
				} {
					if set(f.flag) {
						f.put()
					}
				}
				if set("bytes-at-once") {
					if p.BytesAtOnce, err = parseSize(bytes); err != nil {
						return err
					}
				}
				if set("weight") {
					if p.Weights, err = parseWeights(weights); err != nil {
						return err
					}
				}
				_, err = s.meta.Do(ctx, &pb.Command{Op: &pb.Command_SetPlacement{SetPlacement: &pb.SetPlacement{Placement: p}}})
				return err
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&policy, "policy", "", "local, min, max or balanced")
	f.StringVar(&order, "order", "", "of the queue: fifo, sjf, round-robin or priority")
	f.DurationVar(&age, "age", 0, "sjf: nothing waits longer behind shorter ones (an hour)")
	f.DurationVar(&quantum, "quantum", 0, "a batch VM's turn (a minute)")
	f.DurationVar(&delay, "delay", 0, "local: how long a VM waits for a host with its data (5 s; -1ms: not at all)")
	f.DurationVar(&restart, "restart-after", 0, "VMs of a host unheard of for so long are started elsewhere (30 s; -1ms: never)")
	f.StringVar(&rebalance, "rebalance", "", "what moves by itself: off, data, or all (VMs too, by a restart) (off)")
	f.Uint32Var(&moves, "moves-at-once", 0, "VMs on their way at once (4)")
	f.StringVar(&bytes, "bytes-at-once", "0", "of chunks on their way at once (1G)")
	f.DurationVar(&cool, "cool-after", 0, "chunks nobody has used for so long may go to slow stores (an hour; -1ms: none do)")
	f.Uint32Var(&above, "cool-above", 0, "and do where the fast store is fuller than so many per cent (70)")
	f.StringToStringVar(&weights, "weight", nil, "round-robin: tenant=weight; may be repeated")
	out.register(cmd)
	return cmd
}

func parseWeights(text map[string]string) (map[string]float64, error) {
	out := map[string]float64{}
	for t, v := range text {
		var w float64
		if n, err := fmt.Sscanf(v, "%g", &w); n != 1 || err != nil || w <= 0 {
			return nil, usagef("--weight %s=%s: a weight is a number above 0", t, v)
		}
		out[t] = w
	}
	return out, nil
}

func (o *outputFlag) showPolicy(p *pb.Placement) error {
	def := func(ms, def int64) int64 {
		if ms == 0 {
			return def
		}
		return ms
	}
	v := policyView{Policy: p.GetPolicy(), Order: p.GetOrder(), AgeMs: def(p.GetAgeMs(), 3600_000), QuantumMs: def(p.GetQuantumMs(), 60_000),
		DelayMs: def(p.GetDelayMs(), 5000), Weights: p.GetWeights(),
		RestartMs: def(p.GetRestartMs(), 30_000), Rebalance: p.GetRebalance(), Moves: uint32(def(int64(p.GetMovesAtOnce()), 4)), Bytes: uint64(def(int64(p.GetBytesAtOnce()), 1<<30)),
		CoolMs: def(p.GetCoolMs(), 3600_000), CoolAbove: uint32(def(int64(p.GetCoolPercent()), 70))}
	if v.Rebalance == "" {
		v.Rebalance = "off"
	}
	if v.Policy == "" {
		v.Policy = "local"
	}
	if v.Order == "" {
		v.Order = "fifo"
	}
	ms := func(n int64) string { return (time.Duration(n) * time.Millisecond).String() }
	restart := "never"
	if v.RestartMs >= 0 {
		restart = ms(v.RestartMs)
	}
	return o.show(v, nil, [][]string{{"policy", v.Policy}, {"queue order", v.Order}, {"ageing limit", ms(v.AgeMs)}, {"turn of a batch VM", ms(v.QuantumMs)},
		{"wait for a local host", ms(max(v.DelayMs, 0))}, {"weights", fmt.Sprint(v.Weights)},
		{"a silent host's VMs restart elsewhere after", restart}, {"moves by itself", v.Rebalance},
		{"to slow stores", cools(v)},
		{"at once", fmt.Sprintf("%d VMs, %s of chunks", v.Moves, formatSize(v.Bytes))}})
}

// cools says when chunks go to slow stores.
func cools(v policyView) string {
	if v.CoolMs < 0 {
		return "nothing"
	}
	return fmt.Sprintf("what nobody has used for %v, from fast ones above %d %%", time.Duration(v.CoolMs)*time.Millisecond, v.CoolAbove)
}

func placeRebalance(c *cli) *cobra.Command {
	var dry, data bool
	var moves uint32
	var size string
	var out outputFlag
	cmd := &cobra.Command{
		Use: "rebalance", Short: "Bring VMs and their data together, and even stores out, inside a budget", Args: cobra.NoArgs,
		Long: `Bring running VMs to their data, or hot chunks to their VMs, whichever costs fewer bytes, and
even stores out; and what nobody uses to slow stores, where fast ones are full, and what is
used back. A move must pay within an hour by the heat of now. A VM moves by shutting
down and starting again on its new host. The leader does the same by itself, as far as
"cairn place policy --rebalance" lets it.`,
		Example: "  cairn place rebalance --dry-run\n  cairn place rebalance --moves 4 --bytes 512M\n  cairn place rebalance --data",
		RunE: func(cmd *cobra.Command, _ []string) error {
			bytes, err := parseSize(size)
			if err != nil {
				return err
			}
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				ans, err := s.place(ctx, &pb.PlaceQuestion{Rebalance: true, MovesMax: moves, BytesMax: bytes, NoVms: data, CarryOut: !dry})
				if err != nil {
					return err
				}
				if out.format == "json" {
					list := ans.Moves
					if list == nil {
						list = []*pb.PlaceMove{}
					}
					return out.show(list, nil, nil)
				}
				fmt.Print(ans.Text)
				if !dry && len(ans.Moves) > 0 {
					say("%d moves begun: `cairn events` tells how they go", len(ans.Moves))
				}
				return nil
			})
		},
	}
	cmd.Flags().BoolVar(&dry, "dry-run", false, "show the plan and its prices, change nothing")
	cmd.Flags().BoolVar(&data, "data", false, "move data only, no VMs")
	cmd.Flags().Uint32Var(&moves, "moves", 0, "how many VMs may move (16)")
	cmd.Flags().StringVar(&size, "bytes", "0", "how much data may be on its way (1G)")
	out.register(cmd)
	return cmd
}
