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
