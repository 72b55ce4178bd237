package driver

import (
	"fmt"
	"strings"

	"github.com/cairnstore/cairn/meta/server"
	"github.com/cairnstore/cairn/placement"
	"github.com/cairnstore/cairn/proto/pb"
)

// Terms of plans.
const (
	defaultMovesMax = 16
	minGain         = 0.1 // of a move
	// heatMs is the time a decayed counter stands for: half-life ÷ ln 2.
	heatMs = int64(placement.HalfLife/1e6) * 1443 / 1000
)

// Answer implements server.Placer.
func (placer) Answer(p *server.Picture, q *pb.PlaceQuestion) (*pb.PlaceAnswer, error) {
	s, err := newScene(p)
	if err != nil {
		return nil, err
	}
	if q.Rebalance {
		return s.rebalance(int(q.MovesMax)), nil
	}
	vm, err := s.vm(q.Vm)
	if err != nil {
		return nil, err
	}
	return &pb.PlaceAnswer{Text: s.explain(vm)}, nil
}

// explain says where a VM would go now, how every host scores, and what staying
// and moving cost.
func (s *scene) explain(vm *pb.VM) string {
	j := s.asNew(vm)
	var b strings.Builder
	where := "it is on no host"
	if vm.Host != "" {
		where = "it is on host " + vm.Host
	}
	fmt.Fprintf(&b, "VM %s, policy %s: %s\n", vm.Name, s.sched.Policy, where)
	if d, err := s.decide(j); err != nil {
		fmt.Fprintf(&b, "now it would wait: %s\n", err)
	} else {
		fmt.Fprintf(&b, "now: %s\n", s.sched.Reason(j, d))
	}
	b.WriteString("\n" + s.sched.Explain(j))
	if i, ok := s.fleet.Number(vm.Host); ok && vm.Desired != "stopped" {
		target := s.sched.DecideBut(j, i).Host
		b.WriteString("\n" + s.caseOf(vm, i, target).Explain(placement.DefaultPrices, func(h int) string { return s.pic.Hosts[h].Name }))
	}
	return b.String()
}

// caseOf is what a step for a VM is priced by.
func (s *scene) caseOf(vm *pb.VM, host, target int) placement.Case {
	return placement.Case{VM: vm.Name, Host: host, Target: target, Memory: float64(vm.MemoryBytes), Chunks: s.chunks(vm), HeatMs: heatMs,
		CanMove: true, FreeBytes: float64(s.pic.Hosts[host].FreeBytes)}
}

// rebalance plans moves inside a budget; each one, or both of a swap, must pay.
func (s *scene) rebalance(movesMax int) *pb.PlaceAnswer {
	if movesMax <= 0 {
		movesMax = defaultMovesMax
	}
	for i := range s.pic.Hosts {
		for _, j := range s.fleet.Jobs(i) {
			s.gains(j)
		}
	}
	plan := placement.Rebalance(s.fleet, placement.Budget{Moves: movesMax, Min: minGain, Worth: s.worth})
	ans := &pb.PlaceAnswer{}
	rows := [][]string{{"VM", "FROM", "TO", "MORE LOCAL", "STAYING COSTS", "MOVING COSTS"}}
	for _, m := range plan {
		stay, move := s.prices(m)
		ans.Moves = append(ans.Moves, &pb.PlaceMove{Vm: m.VM, From: s.pic.Hosts[m.From].Name, To: s.pic.Hosts[m.To].Name, Gain: m.Gain, StayBytes: stay, MoveBytes: move})
		rows = append(rows, []string{m.VM, s.pic.Hosts[m.From].Name, s.pic.Hosts[m.To].Name, fmt.Sprintf("%+.0f %%", 100*m.Gain),
			placement.Bytes(uint64(stay)), placement.Bytes(uint64(move))})
	}
	p := placement.DefaultPrices
	head := fmt.Sprintf("bytes over the network in the next %d s by the heat of now, a move's own included; a move, or both of a swap, must save %.0f %% and %s\n",
		p.HorizonMs/1000, 100*p.Hysteresis, placement.Bytes(uint64(p.MinBytes)))
	if len(plan) == 0 {
		ans.Text = head + "nothing is worth moving\n"
		return ans
	}
	ans.Text = head + placement.Table(rows)
	return ans
}

// prices are what staying and moving cost.
func (s *scene) prices(m placement.Move) (stay, move float64) {
	for _, p := range s.caseOf(s.vms[m.VM], m.From, m.To).Price(placement.DefaultPrices) {
		switch p.Step {
		case placement.Stay:
			stay = p.Total()
		case placement.MoveVM:
			move = p.Total()
		}
	}
	return stay, move
}

// worth prices moves that stand or fall together.
func (s *scene) worth(ms []placement.Move) bool {
	stay, move := 0.0, 0.0
	for _, m := range ms {
		a, b := s.prices(m)
		stay, move = stay+a, move+b
	}
	p := placement.DefaultPrices
	return stay-move >= p.MinBytes && stay-move >= p.Hysteresis*stay
}
