package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cairnstore/cairn/chunk/gateway"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// control is what an admin's command line asks of this host.
type control struct {
	pb.UnimplementedHostControlServer
	h *hostd
}

func reply(err error) *pb.HostReply {
	if err == nil {
		return &pb.HostReply{}
	}
	return &pb.HostReply{Status: uint32(status.Of(err)), Detail: err.Error()}
}

// AttachVolume implements pb.HostControlServer. It answers once the volume
// serves, or says what it waits for.
func (c *control) AttachVolume(ctx context.Context, r *pb.AttachVolumeRequest) (*pb.AttachVolumeReply, error) {
	if strings.Contains(r.Volume, "@") {
		return c.showSnapshot(ctx, r.Volume), nil
	}
	v, err := c.h.gw.Attach(ctx, r.Volume, r.Takeover)
	if err == nil {
		err = v.WaitServing(ctx)
	}
	if err != nil {
		return &pb.AttachVolumeReply{Status: uint32(status.Of(err)), Detail: err.Error()}, nil
	}
	return &pb.AttachVolumeReply{Uri: c.h.uri(v.Name()), Epoch: uint32(v.Info().Epoch)}, nil
}

// DetachVolume implements pb.HostControlServer.
func (c *control) DetachVolume(ctx context.Context, r *pb.DetachVolumeRequest) (*pb.HostReply, error) {
	if strings.Contains(r.Volume, "@") {
		return reply(c.h.gw.Hide(r.Volume)), nil
	}
	if err := c.unused(ctx, r.Volume); err != nil {
		return reply(err), nil
	}
	return reply(c.h.gw.Detach(ctx, r.Volume, r.Force)), nil
}

// unused refuses a volume that a VM running here has as a disk.
func (c *control) unused(ctx context.Context, volume string) error {
	rep, err := c.h.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Vms{Vms: true}})
	if err != nil {
		return err
	}
	for _, vm := range rep.Vms {
		if vm.Host != c.h.cfg.Name || vm.Volume != volume && !slices.Contains(vm.Disks, volume) {
			continue
		}
		if _, err := c.h.vms.Show(ctx, vm.Name); err == nil {
			return status.Errorf(status.Held, "volume %s is a disk of VM %s, which runs on host %s: `cairn vm stop %s` lets it go", volume, vm.Name, vm.Host, vm.Name)
		}
	}
	return nil
}

// RefreshVolume implements pb.HostControlServer.
func (c *control) RefreshVolume(ctx context.Context, r *pb.VolumeRef) (*pb.HostReply, error) {
	if err := c.h.gw.Refresh(ctx, r.Volume); err != nil {
		return reply(err), nil
	}
	v, err := c.h.gw.Volume(r.Volume)
	if err != nil {
		return reply(err), nil
	}
	return reply(c.h.vms.Refresh(ctx, r.Volume, v.Size())), nil
}

// ShrinkVolume implements pb.HostControlServer. A VM would not see the new end.
func (c *control) ShrinkVolume(ctx context.Context, r *pb.ShrinkVolumeRequest) (*pb.HostReply, error) {
	if err := c.unused(ctx, r.Volume); err != nil {
		return reply(err), nil
	}
	return reply(c.h.gw.Shrink(ctx, r.Volume, gateway.ShrinkRequest{Bytes: r.SizeBytes, DiscardTail: r.DiscardTail, KeepSeconds: r.KeepSeconds})), nil
}

// vm reads a VM's definition from metadata.
func (c *control) vm(ctx context.Context, name string) (*pb.VM, error) {
	rep, err := c.h.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Vm{Vm: name}})
	if err != nil {
		return nil, err
	}
	if len(rep.Vms) != 1 {
		return nil, status.Errorf(status.NotFound, "there is no VM %s: `cairn vm create %s` makes one", name, name)
	}
	return rep.Vms[0], nil
}

// ready waits until the VMs that outlived the last process are known.
func (c *control) ready(ctx context.Context) error {
	select {
	case <-c.h.adopted:
		return nil
	case <-ctx.Done():
		return status.Errorf(status.Unavailable, "host %s is still looking for the VMs that outlived its last process: ask again", c.h.cfg.Name)
	}
}

// StartVM implements pb.HostControlServer.
func (c *control) StartVM(ctx context.Context, r *pb.VMRef) (*pb.HostReply, error) {
	if err := c.ready(ctx); err != nil {
		return reply(err), nil
	}
	vm, err := c.vm(ctx, r.Vm)
	if err != nil {
		return reply(err), nil
	}
	if vm.Host != c.h.cfg.Name {
		return reply(status.Errorf(status.Conflict, "VM %s belongs on host %s, not on %s", vm.Name, vm.Host, c.h.cfg.Name)), nil
	}
	return reply(c.h.vms.Start(ctx, vm)), nil
}

// StopVM implements pb.HostControlServer.
func (c *control) StopVM(ctx context.Context, r *pb.VMRef) (*pb.HostReply, error) {
	if err := c.ready(ctx); err != nil {
		return reply(err), nil
	}
	return reply(c.h.vms.Stop(ctx, r.Vm, r.Force)), nil
}

// PauseVM implements pb.HostControlServer.
func (c *control) PauseVM(ctx context.Context, r *pb.VMRef) (*pb.HostReply, error) {
	if err := c.ready(ctx); err != nil {
		return reply(err), nil
	}
	return reply(c.h.vms.Pause(ctx, r.Vm)), nil
}

// ResumeVM implements pb.HostControlServer.
func (c *control) ResumeVM(ctx context.Context, r *pb.VMRef) (*pb.HostReply, error) {
	if err := c.ready(ctx); err != nil {
		return reply(err), nil
	}
	return reply(c.h.vms.Resume(ctx, r.Vm)), nil
}

// ShowVM implements pb.HostControlServer.
func (c *control) ShowVM(ctx context.Context, r *pb.VMRef) (*pb.VMReply, error) {
	if err := c.ready(ctx); err != nil {
		return &pb.VMReply{Status: uint32(status.Of(err)), Detail: err.Error(), Name: r.Vm}, nil
	}
	s, err := c.h.vms.Show(ctx, r.Vm)
	if err != nil {
		return &pb.VMReply{Status: uint32(status.Of(err)), Detail: err.Error(), Name: r.Vm}, nil
	}
	rep := &pb.VMReply{Name: r.Vm, State: s.State, Accel: s.Accel, Pid: int64(s.PID), Console: s.Console, Log: s.Log, Qmp: s.QMP, Migration: c.h.moves.last(r.Vm)}
	if _, away := c.h.moves.get(r.Vm); away {
		if g, _, err := c.h.vms.Migration(ctx, r.Vm); err == nil {
			rep.Migration = &pb.VMMigration{State: g.State, SentBytes: g.Sent, TotalBytes: g.Total, RemainingBytes: g.Remaining}
		}
	}
	return rep, nil
}

// HostStatus implements pb.HostControlServer.
func (c *control) HostStatus(context.Context, *pb.HostStatusRequest) (*pb.HostStatusReply, error) {
	rep := &pb.HostStatusReply{Host: c.h.cfg.Name, Stores: c.h.usage(), Session: c.h.gw.Session(), UnixNs: time.Now().UnixNano(), Program: program()}
	for _, v := range c.h.gw.Volumes() {
		rep.Attachments = append(rep.Attachments, c.attachment(v.Name()))
	}
	live := map[ids.VolumeID]uint64{}
	for _, s := range c.h.stores {
		rep.Bad = append(rep.Bad, badCounts(s)...)
		for id, n := range s.Volumes() {
			live[id] += n
		}
	}
	for id, n := range live {
		rep.Volumes = append(rep.Volumes, &pb.VolumeUsage{VolumeId: uint64(id), LiveBytes: n})
	}
	return rep, nil
}

// badCounts says how many blocks of which volumes a store cannot read.
func badCounts(s *hostStore) (out []*pb.BadCount) {
	id := s.ID()
	for _, b := range s.BadBlocks() { // by volume
		if n := len(out); n == 0 || out[n-1].VolumeId != uint64(b.Volume) {
			out = append(out, &pb.BadCount{Store: id[:], VolumeId: uint64(b.Volume)})
		}
		out[len(out)-1].Blocks++
	}
	return out
}

func (c *control) attachment(name string) *pb.AttachmentStatus {
	v, err := c.h.gw.Volume(name)
	if err != nil {
		return &pb.AttachmentStatus{Volume: name, State: err.Error()}
	}
	in := v.Info()
	a := &pb.AttachmentStatus{VolumeId: uint64(v.ID()), Volume: name, Epoch: uint32(in.Epoch), Revision: uint64(in.Revision),
		State: in.State.String(), Uri: c.h.uri(name), Reads: in.Stats.Reads, Writes: in.Stats.Writes, Flushes: in.Stats.Flushes,
		ReadBlocks: in.Stats.ReadBlocks, LocalBlocks: in.Stats.LocalBlocks,
		MaxWriteStallUs: uint64(in.Stats.MaxWriteStall.Microseconds()), InFlight: uint64(in.InFlight), FullWrites: uint64(in.Full), FullOn: in.FullOn}
	if x := c.h.nbd.Stats(name); x.Errors > 0 {
		a.Errors, a.ErrorUnixNs, a.Error = x.Errors, time.Now().Add(-x.ErrorAgo).UnixNano(), x.Error.String()
	}
	if in.Why != "" {
		a.State = fmt.Sprintf("%s: %s", a.State, in.Why)
	}
	if sh := in.Share; sh.IOPS > 0 {
		a.State = fmt.Sprintf("%s, held to %d IOPS and %s/s for what others are promised", a.State, sh.IOPS, formatSize(sh.Bytes))
	}
	for _, r := range in.Replicas {
		a.Replicas = append(a.Replicas, &pb.ReplicaStatus{Store: r.Store[:], Host: r.Host, State: r.State, JoinedBytes: r.JoinedBytes})
	}
	return a
}

// vmVolumes attaches the disks of this host's VMs.
type vmVolumes struct{ h *hostd }

// Attach implements agent.Volumes.
func (d vmVolumes) Attach(ctx context.Context, name string) (string, error) {
	v, err := d.h.gw.Attach(ctx, name, false)
	if err == nil {
		err = v.WaitServing(ctx)
	}
	if err != nil {
		return "", err
	}
	return d.h.uri(name), nil
}

// Detach implements agent.Volumes.
func (d vmVolumes) Detach(ctx context.Context, name string) error {
	d.h.gw.Unexpect(name)
	return d.h.gw.Detach(ctx, name, false)
}
