package driver

import (
	"hash/fnv"

	"github.com/cairnstore/cairn/meta/server"
	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/placement"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// scene is a picture as a fleet, with what is bound where it is.
type scene struct {
	pic   *server.Picture
	fleet *placement.Fleet
	sched *placement.Scheduler
	order placement.Order
	vms   map[string]*pb.VM
}

// sampled is how many random hosts a decision looks at; small clusters are
// looked at whole.
const sampled = placement.SampleHosts

func newScene(p *server.Picture) (*scene, error) {
	policy, err := placement.ParsePolicy(p.Policy.GetPolicy())
	if err != nil {
		return nil, err
	}
	s := &scene{pic: p, fleet: placement.NewFleet(), vms: map[string]*pb.VM{}}
	if s.order, err = placement.ParseOrder(p.Policy.GetOrder()); err != nil {
		return nil, err
	}
	for _, h := range p.Hosts {
		if _, err := s.fleet.Add(machine(h)); err != nil {
			return nil, err
		}
	}
	h := fnv.New64a()
	for _, vm := range p.VMs {
		s.vms[vm.Name] = vm
		_, _ = h.Write([]byte(vm.Name)) // a hash.Hash never returns an error
		if i, ok := s.fleet.Number(vm.Host); ok && vm.Desired != "stopped" {
			if err := s.fleet.Hold(s.job(vm), i); err != nil {
				return nil, err
			}
		}
	}
	s.sched = placement.NewScheduler(s.fleet, policy, sampled, h.Sum64()^uint64(len(p.VMs)))
	return s, nil
}

func machine(h server.HostView) placement.Machine {
	m := placement.Machine{Name: h.Name, Up: h.Up, Drained: h.Drained, Labels: map[string]string{"host": h.Name},
		Networks: h.GetPromise().GetNetworks(), Capacity: placement.Amounts(state.Capacity(h.Host)), Promised: placement.Percents(state.Percents(h.Host))}
	for k, v := range h.Labels {
		if k != "host" {
			m.Labels[k] = v
		}
	}
	return m
}

// job translates a VM, with what it takes now if it is on a host and what it
// asks for otherwise. Gains are left out: they cost a walk over its chunks.
func (s *scene) job(vm *pb.VM) *placement.Job {
	n := vm.GetNeeds()
	j := &placement.Job{Name: vm.Name, Need: placement.Amounts(state.Need(vm)), Labels: n.GetLabels(), Networks: n.GetNetworks(),
		Group: n.GetGroup(), Near: n.GetNear(), Apart: n.GetApart(), Domain: n.GetDomain(), Tenant: n.GetTenant(),
		Class: int(n.GetPriority()), Batch: n.GetBatch(), DurationMs: n.GetDurationMs()}
	if vm.Host != "" && vm.Desired != "stopped" {
		j.Need = placement.Amounts(state.Takes(vm))
		if vm.GetQueue().GetSliced() {
			j.Sliced = state.Need(vm)[0]
		}
	}
	return j
}

// gains fills in what part of a VM's traffic each host would serve itself.
func (s *scene) gains(j *placement.Job) { j.Gains = placement.Gain(s.chunks(s.vms[j.Name])) }

// chunks translates a VM's chunks; replicas on hosts that are not in the
// picture are left out.
func (s *scene) chunks(vm *pb.VM) []placement.ChunkHeat {
	views := s.pic.Chunks(vm)
	out := make([]placement.ChunkHeat, 0, len(views))
	for _, v := range views {
		c := placement.ChunkHeat{Heat: placement.Heat{Read: v.Read, Write: v.Write}, Bytes: v.Bytes}
		for _, name := range v.Hosts {
			if i, ok := s.fleet.Number(name); ok {
				c.Hosts = append(c.Hosts, i)
			}
		}
		out = append(out, c)
	}
	return out
}

func (s *scene) vm(name string) (*pb.VM, error) {
	if vm := s.vms[name]; vm != nil {
		return vm, nil
	}
	return nil, status.Errorf(status.NotFound, "there is no VM %q", name)
}
