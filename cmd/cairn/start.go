package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// needFlags are the flags of what a VM asks for beside processors and memory.
type needFlags struct {
	disk, bandwidth, class string
	labels                 []string
	duration               time.Duration
}

func (n *needFlags) register(f *pflag.FlagSet, v *pb.VMNeeds) {
	f.StringVar(&n.disk, "local-disk", "0", "local disk of its host, reserved")
	f.StringVar(&n.bandwidth, "bandwidth", "0", "disk traffic a second, reserved")
	f.StringArrayVar(&n.labels, "label", nil, "label the host must have, name=value; may be repeated")
	f.StringArrayVar(&v.Networks, "network", nil, "storage network the host must reach; may be repeated")
	f.StringVar(&v.Group, "group", "", "group that --near and --apart of others name")
	f.StringVar(&v.Near, "near", "", "group: only beside one of its VMs")
	f.StringVar(&v.Apart, "apart", "", "group: never beside one of its VMs")
	f.StringVar(&v.Domain, "domain", "", "what beside means: host, rack, zone (default host)")
	f.StringVar(&v.Tenant, "tenant", "", "whose it is; tenants share the queue by weight")
	f.StringVar(&n.class, "class", "service", "service, or batch: may be paused so that others get a turn, and is over when it ends")
	f.Int32Var(&v.Priority, "priority", 0, "higher goes first, and may make lower ones wait again")
	f.DurationVar(&n.duration, "duration", 0, "how long it will run, for shortest-job-first (default: unknown)")
}

func (n *needFlags) into(v *pb.VMNeeds) (err error) {
	if v.DiskBytes, err = parseSize(n.disk); err != nil {
		return err
	}
	if v.BandwidthBytes, err = parseSize(n.bandwidth); err != nil {
		return err
	}
	v.Labels = map[string]string{}
	for _, l := range n.labels {
		k, val, ok := strings.Cut(l, "=")
		if !ok || k == "" {
			return usagef("--label %q is not name=value", l)
		}
		v.Labels[k] = val
	}
	switch n.class {
	case "service", "batch":
		v.Batch = n.class == "batch"
	default:
		return usagef("--class %q is not service or batch", n.class)
	}
	if n.duration < 0 {
		return usagef("--duration %s is below 0", n.duration)
	}
	v.DurationMs = n.duration.Milliseconds()
	return nil
}

func class(vm *pb.VM) string {
	if vm.GetNeeds().GetBatch() {
		return "batch"
	}
	return "service"
}

// raceMax bounds how often a command begins anew after another was faster.
const raceMax = 8

// want changes what a VM is meant to do, and where, whatever else happens to it
// meanwhile.
func (s *session) want(ctx context.Context, name, desired, host string, q *pb.VMQueue) (err error) {
	for range raceMax {
		vm, verr := s.vm(ctx, name)
		if verr != nil {
			return verr
		}
		_, err = s.meta.Do(ctx, &pb.Command{Op: &pb.Command_BindVm{BindVm: &pb.BindVM{Vm: name, Revision: vm.Revision, Host: host, Desired: desired, Queue: q}}})
		if !errors.Is(err, status.Conflict) {
			return err
		}
	}
	return err
}

func vmStart(c *cli) *cobra.Command {
	var host string
	var noWait bool
	cmd := &cobra.Command{
		Use: "start NAME", Short: "Start a VM on the best host, or on the one named", Args: cobra.ExactArgs(1),
		Long: `Start a VM on the best host, or on the one named. Where no host has room it waits in the
queue, in the order of ` + "`cairn place policy`" + `, and is started when its turn comes.`,
		Example: "  cairn vm start web\n  cairn vm start web --host host-2\n  cairn vm start night-job --no-wait",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), 2*cliWait, func(ctx context.Context, s *session) error {
				return s.startVM(ctx, args[0], host, noWait)
			})
		},
	}
	cmd.Flags().StringVar(&host, "host", "", "host (default: where most of its data is and it fits)")
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "fail instead of waiting in the queue")
	return cmd
}

func (s *session) startVM(ctx context.Context, name, host string, noWait bool) error {
	vm, err := s.vm(ctx, name)
	if err != nil {
		return err
	}
	switch {
	case vm.Host != "" && vm.Desired != "stopped":
		if host != "" && host != vm.Host {
			return status.Errorf(status.Held, "VM %s is %s on host %s: stop it first", name, vm.Desired, vm.Host)
		}
		return s.startOn(ctx, vm, vm.Host)
	case vm.GetQueue().GetStep() == state.StepQueued && host == "":
		return s.waitStart(ctx, name)
	case host != "":
		return s.startOn(ctx, vm, host)
	}
	for range raceMax {
		rep, perr := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_PlaceVm{PlaceVm: &pb.PlaceVM{Vm: name}}})
		if k := status.Of(perr); !noWait && (k == status.NoSpace || k == status.Unavailable) {
			say("%v", perr)
			if err := s.want(ctx, name, "running", "", &pb.VMQueue{Step: state.StepQueued, Reason: perr.Error()}); err != nil {
				return err
			}
			return s.waitStart(ctx, name)
		}
		if perr != nil {
			return perr
		}
		say("on %s: %s", rep.PlaceHost, rep.PlaceReason)
		if err = s.startOn(ctx, vm, rep.PlaceHost); !errors.Is(err, status.Conflict) && !errors.Is(err, status.NoSpace) {
			return err
		}
		if vm, err = s.vm(ctx, name); err != nil { // another was faster
			return err
		}
	}
	return status.Errorf(status.Conflict, "VM %s lost %d races for a host: try again", name, raceMax)
}

// startOn binds a VM to a host and starts it there.
func (s *session) startOn(ctx context.Context, vm *pb.VM, host string) error {
	before := vm.Desired
	if _, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_BindVm{BindVm: &pb.BindVM{Vm: vm.Name, Revision: vm.Revision, Host: host, Desired: "running"}}}); err != nil {
		return err
	}
	err := hostDone(onHost(ctx, s, host, func(ctx context.Context, hc pb.HostControlClient) (*pb.HostReply, error) {
		return hc.StartVM(ctx, &pb.VMRef{Vm: vm.Name})
	}))
	if err == nil || before == "running" {
		return err
	}
	if werr := s.want(ctx, vm.Name, before, vm.Host, nil); werr != nil {
		return fmt.Errorf("%w (and it is still marked as running: %v)", err, werr)
	}
	return err
}

// startPatience is how long a start waits for the queue before it leaves the VM
// there.
const startPatience = 15 * time.Second

// waitStart waits for a queued VM a little.
func (s *session) waitStart(ctx context.Context, name string) error {
	t := time.NewTicker(200 * time.Millisecond)
	defer t.Stop()
	for end := time.Now().Add(startPatience); time.Now().Before(end); {
		vm, err := s.vm(ctx, name)
		if err != nil {
			return err
		}
		switch q := vm.GetQueue(); {
		case vm.Desired == "stopped":
			return status.Errorf(status.Conflict, "VM %s was stopped while it waited for a host: %s", name, dash(q.GetReason()))
		case q.GetStep() == "":
			say("on %s: %s", vm.Host, q.GetReason())
			return nil
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	say("VM %s waits in the queue: `cairn vm show %s` tells when it runs, `cairn vm stop %s` takes it out", name, name, name)
	return nil
}
