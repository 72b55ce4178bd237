package driver

import (
	"fmt"
	"strings"

	"github.com/cairnstore/cairn/meta/server"
	"github.com/cairnstore/cairn/placement"
	"github.com/cairnstore/cairn/proto/pb"
)

const (
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
		return s.rebalance(q), nil
	}
	vm, err := s.vm(q.Vm)
	if err != nil {
		return nil, err
	}
	return s.explain(vm), nil
}

// explain says where a VM would go now, how every host scores, and what staying
// and moving cost: as a text, and taken apart.
func (s *scene) explain(vm *pb.VM) *pb.PlaceAnswer {
	j := s.asNew(vm)
	ans := &pb.PlaceAnswer{}
	var b strings.Builder
	where := "it is on no host"
	if vm.Host != "" {
		where = "it is on host " + vm.Host
	}
	fmt.Fprintf(&b, "VM %s, policy %s: %s\n", vm.Name, s.sched.Policy, where)
	if d, err := s.decide(j); err != nil {
		ans.Reason = err.Error()
		fmt.Fprintf(&b, "now it would wait: %s\n", err)
	} else {
		ans.Host, ans.Reason = s.pic.Hosts[d.Host].Name, s.sched.Reason(j, d)
		fmt.Fprintf(&b, "now: %s\n", ans.Reason)
	}
	scores := s.sched.Scores(j)
	for _, h := range scores {
		sc := &pb.PlaceScore{Host: h.Host, Refused: h.Refused, Sum: h.Sum}
		for i, w := range s.sched.Weights {
			sc.Terms = append(sc.Terms, &pb.PlaceTerm{Name: w.Name, Weight: w.Weight, Value: h.Values[i]})
		}
		ans.Scores = append(ans.Scores, sc)
	}
	b.WriteString("\n" + s.sched.Explain(scores))
	if i, ok := s.fleet.Number(vm.Host); ok && vm.Desired != "stopped" {
		c := s.caseOf(vm, i, s.sched.DecideBut(j, i).Host)
		name := func(h int) string { return s.pic.Hosts[h].Name }
		chosen := c.Choose(placement.DefaultPrices).Step
		for _, p := range c.Price(placement.DefaultPrices) {
			ans.Steps = append(ans.Steps, &pb.PlaceStep{Step: string(p.Step), Host: name(p.Host), OnceBytes: p.Once, NetworkBytes: p.Remote, Impossible: p.Why, Chosen: p.Step == chosen})
		}
		b.WriteString("\n" + c.Explain(placement.DefaultPrices, name))
	}
	ans.Text = b.String()
	return ans
}

// caseOf is what a step for a VM is priced by.
func (s *scene) caseOf(vm *pb.VM, host, target int) placement.Case {
	return placement.Case{VM: vm.Name, Host: host, Target: target, Memory: float64(vm.MemoryBytes), Chunks: s.chunks(vm), HeatMs: heatMs,
		CanMove: true, FreeBytes: float64(s.pic.Hosts[host].FreeBytes)}
}
