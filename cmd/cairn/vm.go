package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// vmView is a VM as `-o json` shows it.
type vmView struct {
	Name    string   `json:"name"`
	State   string   `json:"state"`   // what it does: running, paused, stopped, …
	Desired string   `json:"desired"` // what it is meant to do
	Host    string   `json:"host,omitempty"`
	CPUs    uint32   `json:"cpus"`
	Memory  uint64   `json:"memoryBytes"`
	Disks   []string `json:"disks"`
	Accel   string   `json:"accel,omitempty"`
	Pid     int64    `json:"pid,omitempty"`
	Console string   `json:"console,omitempty"`
	Log     string   `json:"log,omitempty"`

	Step     string `json:"step,omitempty"`   // on its way: queued, starting, evicting, migrating, switched, landed, returning
	Reason   string `json:"reason,omitempty"` // why it is there, or not yet
	Class    string `json:"class,omitempty"`  // service or batch
	Tenant   string `json:"tenant,omitempty"`
	Priority int32  `json:"priority"`
	Revision uint64 `json:"revision"`
}

func vmCommand(c *cli) *cobra.Command {
	cmd := &cobra.Command{Use: "vm", Short: "Virtual machines whose disks are volumes"}
	cmd.AddCommand(vmCreate(c), vmList(c), vmShow(c), vmStart(c), vmStop(c), vmRemove(c), vmConsole(c), vmMigrate(c),
		vmSimple(c, "pause", "Halt a VM's processors; its memory stays", "paused", pb.HostControlClient.PauseVM),
		vmSimple(c, "resume", "Let a paused VM go on", "running", pb.HostControlClient.ResumeVM))
	return cmd
}

func vmCreate(c *cli) *cobra.Command {
	vm := &pb.VM{Desired: "stopped", Needs: &pb.VMNeeds{}}
	var memory string
	var needs needFlags
	cmd := &cobra.Command{
		Use: "create NAME --volume VOLUME", Short: "Define a VM", Args: cobra.ExactArgs(1),
		Example: "  cairn vm create web --volume web-root --memory 512M --cpus 2\n  cairn vm create tiny --volume v --kernel vmlinuz --initrd initrd.img --append console=ttyS0",
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := parseSize(memory)
			if err != nil {
				return err
			}
			vm.Name, vm.MemoryBytes = args[0], n
			if err := needs.into(vm.Needs); err != nil {
				return err
			}
			for _, p := range []*string{&vm.Kernel, &vm.Initrd} {
				if *p != "" {
					if *p, err = filepath.Abs(*p); err != nil {
						return err
					}
				}
			}
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error { return s.createVM(ctx, vm) })
		},
	}
	f := cmd.Flags()
	f.StringVar(&vm.Volume, "volume", "", "volume that is its first disk")
	f.StringArrayVar(&vm.Disks, "disk", nil, "further volume; may be repeated")
	f.StringVar(&memory, "memory", "512M", "memory")
	f.Uint32Var(&vm.Cpus, "cpus", 1, "processors")
	needs.register(f, vm.Needs)
	f.StringVar(&vm.Kernel, "kernel", "", "kernel to boot directly, a file on the host (default: boot from the disk)")
	f.StringVar(&vm.Initrd, "initrd", "", "initial RAM disk for --kernel")
	f.StringVar(&vm.Append, "append", "", "command line for --kernel")
	must(cmd.MarkFlagRequired("volume"))
	return cmd
}

func (s *session) createVM(ctx context.Context, vm *pb.VM) error {
	for _, v := range append([]string{vm.Volume}, vm.Disks...) {
		if _, err := s.volume(ctx, v); err != nil {
			return err
		}
	}
	_, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_PutVm{PutVm: &pb.PutVM{Vm: vm, Create: true}}})
	return err
}

func (s *session) vm(ctx context.Context, name string) (*pb.VM, error) {
	rep, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Vm{Vm: name}})
	if err != nil {
		return nil, err
	}
	if len(rep.Vms) != 1 {
		return nil, status.Errorf(status.NotFound, "there is no VM %q: `cairn vm ls` lists them", name)
	}
	return rep.Vms[0], nil
}

func vmStop(c *cli) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "stop NAME", Short: "Shut a VM down and let its volumes go", Args: cobra.ExactArgs(1), Example: "  cairn vm stop web\n  cairn vm stop web --force",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), 4*cliWait, func(ctx context.Context, s *session) error { return s.stopVM(ctx, args[0], force) })
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "pull the plug instead of asking the guest")
	return cmd
}

func (s *session) stopVM(ctx context.Context, name string, force bool) error {
	vm, err := s.vm(ctx, name)
	if err != nil {
		return err
	}
	if vm.Host == "" {
		say("VM %s is stopped", name)
		if vm.Desired == "stopped" {
			return nil
		}
		return s.want(ctx, name, "stopped", "", nil) // it waited for a host
	}
	err = hostDone(onHost(ctx, s, vm.Host, func(ctx context.Context, hc pb.HostControlClient) (*pb.HostReply, error) {
		return hc.StopVM(ctx, &pb.VMRef{Vm: name, Force: force})
	}))
	switch status.Of(err) {
	case status.OK, status.NotFound:
		return s.want(ctx, name, "stopped", "", nil)
	case status.Unavailable:
		if up, uerr := s.isUp(ctx, vm.Host); uerr != nil || up {
			return errors.Join(err, uerr) // it may only be starting again
		}
		if werr := s.want(ctx, name, "stopped", "", nil); werr != nil {
			return errors.Join(err, werr)
		}
		say("VM %s is noted as stopped, but its host %s is down: if the machine still runs there, it is ended when the host is back. Until then its volumes are held there: `cairn volume attach --takeover` fences that host", name, vm.Host)
		return nil
	}
	return err
}

// isUp says whether metadata hears of a host.
func (s *session) isUp(ctx context.Context, host string) (bool, error) {
	hosts, err := s.hosts(ctx)
	for _, h := range hosts {
		if h.Host.Name == host {
			return h.Up, nil
		}
	}
	return false, err
}

type vmCall func(pb.HostControlClient, context.Context, *pb.VMRef, ...grpc.CallOption) (*pb.HostReply, error)

func vmSimple(c *cli, use, short, desired string, call vmCall) *cobra.Command {
	return &cobra.Command{
		Use: use + " NAME", Short: short, Args: cobra.ExactArgs(1), Example: "  cairn vm " + use + " web",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				vm, err := s.vm(ctx, args[0])
				if err != nil {
					return err
				}
				if vm.Host == "" {
					return status.Errorf(status.Conflict, "VM %s is stopped: `cairn vm start %s` starts it", vm.Name, vm.Name)
				}
				err = hostDone(onHost(ctx, s, vm.Host, func(ctx context.Context, hc pb.HostControlClient) (*pb.HostReply, error) {
					return call(hc, ctx, &pb.VMRef{Vm: vm.Name})
				}))
				if err != nil {
					return err
				}
				return s.want(ctx, vm.Name, desired, vm.Host, nil)
			})
		},
	}
}

func vmRemove(c *cli) *cobra.Command {
	return &cobra.Command{
		Example: "  cairn vm rm web",
		Use:     "rm NAME", Short: "Remove a VM's definition; its volumes stay", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				_, err := s.meta.Do(ctx, &pb.Command{Op: &pb.Command_DeleteVm{DeleteVm: &pb.DeleteVM{Name: args[0]}}})
				return err
			})
		},
	}
}

func (s *session) vmView(ctx context.Context, vm *pb.VM) vmView {
	w := vmView{Name: vm.Name, State: "stopped", Desired: vm.Desired, Host: vm.Host, CPUs: vm.Cpus, Memory: vm.MemoryBytes,
		Disks: append([]string{vm.Volume}, vm.Disks...), Step: vm.GetQueue().GetStep(), Reason: vm.GetQueue().GetReason(),
		Class: class(vm), Tenant: vm.GetNeeds().GetTenant(), Priority: vm.GetNeeds().GetPriority(), Revision: vm.Revision}
	if w.Step == state.StepQueued {
		w.State = "pending"
	}
	if vm.Host == "" {
		return w
	}
	rep, err := onHost(ctx, s, vm.Host, func(ctx context.Context, hc pb.HostControlClient) (*pb.VMReply, error) {
		return hc.ShowVM(ctx, &pb.VMRef{Vm: vm.Name})
	})
	switch {
	case err != nil:
		w.State = "unknown: " + err.Error()
	case rep.Status != 0 && status.Kind(rep.Status) != status.NotFound:
		w.State = "unknown: " + rep.Detail
	case rep.Status != 0 && w.Step == state.StepStarting:
		w.State = "starting"
	case rep.Status == 0:
		w.State, w.Accel, w.Pid, w.Console, w.Log = rep.State, rep.Accel, rep.Pid, rep.Console, rep.Log
	}
	return w
}

func vmList(c *cli) *cobra.Command {
	var out outputFlag
	cmd := &cobra.Command{
		Example: "  cairn vm ls",
		Use:     "ls", Short: "List the VMs", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				rep, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Vms{Vms: true}})
				if err != nil {
					return err
				}
				views, rows := []vmView{}, [][]string{}
				for _, vm := range rep.Vms {
					w := s.vmView(ctx, vm)
					views = append(views, w)
					rows = append(rows, []string{w.Name, w.State, dash(w.Host), fmt.Sprint(w.CPUs), formatSize(w.Memory), fmt.Sprint(w.Disks)})
				}
				return out.show(views, []string{"VM", "STATE", "HOST", "CPUS", "MEMORY", "DISKS"}, rows)
			})
		},
	}
	out.register(cmd)
	return cmd
}

func vmShow(c *cli) *cobra.Command {
	var out outputFlag
	cmd := &cobra.Command{
		Example: "  cairn vm show web",
		Use:     "show NAME", Short: "Show a VM", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				vm, err := s.vm(ctx, args[0])
				if err != nil {
					return err
				}
				w := s.vmView(ctx, vm)
				return out.show(w, nil, [][]string{{"name", w.Name}, {"state", w.State}, {"desired", w.Desired}, {"host", dash(w.Host)},
					{"cpus", fmt.Sprint(w.CPUs)}, {"memory", formatSize(w.Memory)}, {"disks", fmt.Sprint(w.Disks)}, {"accelerator", dash(w.Accel)},
					{"process", fmt.Sprint(w.Pid)}, {"console", dash(w.Console)}, {"console log", dash(w.Log)},
					{"class", w.Class}, {"priority", fmt.Sprint(w.Priority)}, {"tenant", dash(w.Tenant)}, {"step", dash(w.Step)}, {"reason", dash(w.Reason)}})
			})
		},
	}
	out.register(cmd)
	return cmd
}
