package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

func placeCommand(c *cli) *cobra.Command {
	cmd := &cobra.Command{Use: "place", Short: "Placement: why something goes where, and what moving it costs"}
	cmd.AddCommand(placeExplain(c), placePolicy(c), placeRebalance(c), placeSimulate())
	return cmd
}

func placeExplain(c *cli) *cobra.Command {
	return &cobra.Command{
		Use: "explain VM", Short: "Say where a VM would go now, how every host scores, and what staying and moving cost", Args: cobra.ExactArgs(1),
		Example: "  cairn place explain web",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				ans, err := s.place(ctx, &pb.PlaceQuestion{Vm: args[0]})
				if err != nil {
					return err
				}
				fmt.Print(ans.Text)
				return nil
			})
		},
	}
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
	Weights   map[string]float64 `json:"weights"`
}

func placePolicy(c *cli) *cobra.Command {
	var out outputFlag
	var age, quantum, delay time.Duration
	var policy, order string
	var weights map[string]string
	cmd := &cobra.Command{
		Use: "policy", Short: "Show or set the cluster's placement policy and the order of the queue", Args: cobra.NoArgs,
		Example: "  cairn place policy\n  cairn place policy --policy local --order sjf --age 30m\n  cairn place policy --order round-robin --weight red=2 --weight blue=1",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				ans, err := s.place(ctx, &pb.PlaceQuestion{Settings: true})
				if err != nil {
					return err
				}
				p := ans.Settings
				set := cmd.Flags().Changed
				if !set("policy") && !set("order") && !set("age") && !set("quantum") && !set("delay") && !set("weight") {
					return out.showPolicy(p)
				}
				for _, f := range []struct {
					flag string
					put  func()
				}{
					{"policy", func() { p.Policy = policy }}, {"order", func() { p.Order = order }},
					{"age", func() { p.AgeMs = age.Milliseconds() }}, {"quantum", func() { p.QuantumMs = quantum.Milliseconds() }},
					{"delay", func() { p.DelayMs = delay.Milliseconds() }},
				} {
					if set(f.flag) {
						f.put()
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
		DelayMs: def(p.GetDelayMs(), 5000), Weights: p.GetWeights()}
	if v.Policy == "" {
		v.Policy = "local"
	}
	if v.Order == "" {
		v.Order = "fifo"
	}
	ms := func(n int64) string { return (time.Duration(n) * time.Millisecond).String() }
	return o.show(v, nil, [][]string{{"policy", v.Policy}, {"queue order", v.Order}, {"ageing limit", ms(v.AgeMs)}, {"turn of a batch VM", ms(v.QuantumMs)},
		{"wait for a local host", ms(max(v.DelayMs, 0))}, {"weights", fmt.Sprint(v.Weights)}})
}

func placeRebalance(c *cli) *cobra.Command {
	var dry bool
	var moves uint32
	var out outputFlag
	cmd := &cobra.Command{
		Use: "rebalance", Short: "Bring running VMs to their data, inside a budget of moves", Args: cobra.NoArgs,
		Long: `Bring running VMs to their data, inside a budget of moves. A move must pay within an hour by
the heat of now. A VM moves by shutting down and starting again on its new host.`,
		Example: "  cairn place rebalance --dry-run\n  cairn place rebalance --moves 4",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				ans, err := s.place(ctx, &pb.PlaceQuestion{Rebalance: true, MovesMax: moves})
				if err != nil {
					return err
				}
				if out.format == "json" {
					list := ans.Moves
					if list == nil {
						list = []*pb.PlaceMove{}
					}
					if err := out.show(list, nil, nil); err != nil {
						return err
					}
				} else {
					fmt.Print(ans.Text)
				}
				if dry {
					return nil
				}
				return s.move(ctx, ans.Moves)
			})
		},
	}
	cmd.Flags().BoolVar(&dry, "dry-run", false, "show the plan and its prices, change nothing")
	cmd.Flags().Uint32Var(&moves, "moves", 0, "how many VMs may move (16)")
	out.register(cmd)
	return cmd
}

// move sends VMs to their new hosts. Room is checked when each arrives there;
// one that finds none goes through the queue.
func (s *session) move(ctx context.Context, moves []*pb.PlaceMove) (err error) {
	for _, m := range moves {
		vm, verr := s.vm(ctx, m.Vm)
		if verr != nil || vm.Host != m.From || vm.Desired != "running" || vm.GetQueue().GetStep() != "" {
			say("VM %s has changed and is left alone", m.Vm)
			continue
		}
		_, berr := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_BindVm{BindVm: &pb.BindVM{Vm: vm.Name, Revision: vm.Revision, Host: vm.Host, Desired: "running",
			Queue: &pb.VMQueue{Step: state.StepEvicting, NextHost: m.To, Reason: fmt.Sprintf("goes to host %s, where %+.0f %% of its traffic is local", m.To, 100*m.Gain)}}}})
		if berr != nil {
			err = errors.Join(err, berr)
			continue
		}
		say("VM %s leaves %s for %s", m.Vm, m.From, m.To)
	}
	return err
}
