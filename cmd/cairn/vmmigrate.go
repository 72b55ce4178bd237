package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// migrateWait bounds how long `vm migrate` watches; the VM goes on moving after.
const migrateWait = 35 * time.Minute

// migrateView is a finished move as `-o json` shows it.
type migrateView struct {
	VM      string  `json:"vm"`
	From    string  `json:"from"`
	To      string  `json:"to"`
	Live    bool    `json:"live"`
	Seconds float64 `json:"seconds"`             // the whole command
	StillMs float64 `json:"stillMs"`             // live: how long its processors stood still
	Sent    uint64  `json:"sentBytes,omitempty"` // live: of its memory
	Reason  string  `json:"reason"`
}

func vmMigrate(c *cli) *cobra.Command {
	var to string
	var cold bool
	var out outputFlag
	cmd := &cobra.Command{
		Use: "migrate NAME", Short: "Move a running VM to another host while it runs", Args: cobra.ExactArgs(1),
		Long: `Move a running VM to another host while it runs: its memory is sent there, its volumes
change hands, and it stands still for a moment. If anything goes wrong it goes on where it
was, and the command says why. Hosts whose machines differ (QEMU's version, KVM or not, the
processor) refuse it; --cold shuts the guest down and starts it there.`,
		Example: "  cairn vm migrate web\n  cairn vm migrate web --to host-2\n  cairn vm migrate web --to host-2 --cold",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), migrateWait, func(ctx context.Context, s *session) error {
				w, err := s.migrateVM(ctx, args[0], to, cold)
				if err != nil {
					return err
				}
				rows := [][]string{{"VM", w.VM}, {"from", w.From}, {"to", w.To}, {"live", fmt.Sprint(w.Live)}, {"took", fmt.Sprintf("%.1f s", w.Seconds)}}
				if w.Live {
					rows = append(rows, []string{"stood still", fmt.Sprintf("%.0f ms", w.StillMs)}, []string{"memory sent", formatSize(w.Sent)})
				}
				return out.show(w, nil, append(rows, []string{"reason", w.Reason}))
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&to, "to", "", "host (default: the best other one, see `cairn place explain`)")
	f.BoolVar(&cold, "cold", false, "shut the guest down and start it there")
	out.register(cmd)
	return cmd
}

func (s *session) migrateVM(ctx context.Context, name, to string, cold bool) (*migrateView, error) {
	begun := time.Now()
	vm, err := s.vm(ctx, name)
	if err != nil {
		return nil, err
	}
	switch {
	case vm.Host == "" || vm.Desired == "stopped":
		return nil, status.Errorf(status.Conflict, "VM %s is stopped: `cairn vm start %s --host HOST` starts it where you want", name, name)
	case vm.Desired != "running":
		return nil, status.Errorf(status.Conflict, "VM %s is %s: `cairn vm resume %s` first", name, vm.Desired, name)
	case vm.GetQueue().GetStep() != "":
		return nil, status.Errorf(status.Conflict, "VM %s is on its way already (%s): `cairn vm show %s` tells how it goes", name, vm.Queue.Step, name)
	case to == vm.Host:
		return nil, status.Errorf(status.Conflict, "VM %s is on host %s already", name, to)
	case vm.GetQueue().GetSliced() && !cold:
		return nil, status.Errorf(status.Conflict, "VM %s takes turns with others and waits for its own: it can only move with --cold", name)
	}
	if to == "" {
		rep, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_PlaceVm{PlaceVm: &pb.PlaceVM{Vm: name, ExceptHosts: []string{vm.Host}}}})
		if err != nil {
			return nil, err
		}
		to = rep.PlaceHost
		say("to %s: %s", to, rep.PlaceReason)
	}
	q := &pb.VMQueue{Step: state.StepMigrating, NextHost: to, Reason: "moved by " + who()}
	if cold {
		q.Step, q.Cold = state.StepEvicting, true
	}
	if _, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_BindVm{BindVm: &pb.BindVM{Vm: name, Revision: vm.Revision, Host: vm.Host, Desired: "running", Queue: q}}}); err != nil {
		return nil, err
	}
	// At once and not with the next heartbeat, which will do if this fails.
	err = hostDone(onHost(ctx, s, vm.Host, func(ctx context.Context, hc pb.HostControlClient) (*pb.HostReply, error) {
		return hc.LookNow(ctx, &pb.VMRef{Vm: name})
	}))
	if err != nil {
		say("%v; it is told with its next heartbeat", err)
	}
	now, err := s.awaitMove(ctx, name, vm.Host)
	if err != nil {
		return nil, err
	}
	if now.Host != to {
		return nil, status.Errorf(status.Unavailable, "VM %s did not move: %s", name, now.GetQueue().GetReason())
	}
	w := &migrateView{VM: name, From: vm.Host, To: to, Live: !cold, Seconds: time.Since(begun).Seconds(), Reason: now.GetQueue().GetReason()}
	if rep, err := s.shown(ctx, now); err == nil && rep.GetMigration().GetState() == "landed" {
		w.StillMs, w.Sent = float64(rep.Migration.StillUs)/1000, rep.Migration.SentBytes
	}
	return w, nil
}

func (s *session) shown(ctx context.Context, vm *pb.VM) (*pb.VMReply, error) {
	return onHost(ctx, s, vm.Host, func(ctx context.Context, hc pb.HostControlClient) (*pb.VMReply, error) {
		return hc.ShowVM(ctx, &pb.VMRef{Vm: vm.Name})
	})
}

// awaitMove watches a VM until it is on nobody's way, and says how far it is.
func (s *session) awaitMove(ctx context.Context, name, from string) (*pb.VM, error) {
	t := time.NewTicker(100 * time.Millisecond)
	defer t.Stop()
	last := ""
	for {
		vm, err := s.vm(ctx, name)
		switch {
		case err != nil && ctx.Err() != nil, vm != nil && vm.GetQueue().GetStep() == "":
			return vm, err
		case err != nil:
			say("%v; still watching", err)
		default:
			line := s.moveLine(ctx, vm, from)
			if line != last {
				say("%s", line)
			}
			last = line
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return nil, status.Errorf(status.Timeout, "VM %s is still on its way: `cairn vm show %s` tells how it goes", name, name)
		}
	}
}

// moveLine is one line of progress.
func (s *session) moveLine(ctx context.Context, vm *pb.VM, from string) string {
	q := vm.GetQueue()
	if q.Step != state.StepMigrating || vm.Host != from {
		return q.Step
	}
	rep, err := s.shown(ctx, vm)
	if g := rep.GetMigration(); err == nil && g.GetTotalBytes() > 0 {
		tenth := 10 * (g.TotalBytes - min(g.RemainingBytes, g.TotalBytes)) / g.TotalBytes
		return fmt.Sprintf("%s: %d %% of its memory of %s is there", q.Step, 10*tenth, formatSize(g.TotalBytes))
	}
	return q.Step
}
