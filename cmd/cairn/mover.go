package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/cairnstore/cairn/chunk/gateway"
	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/netplane/link"
	"github.com/cairnstore/cairn/placement/driver"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/vmhook/agent"
)

// readMax bounds one read through the holder of a volume that is to come here.
const readMax = 1 << 20

// mover fits the launcher, the gateway and the other hosts together for live
// migrations.
type mover struct{ h *hostd }

var _ driver.Mover = mover{}

// to calls another host's process.
func to[R any](ctx context.Context, h *hostd, host string, ask func(context.Context, pb.HostControlClient) (R, error)) (R, error) {
	return onHost(ctx, &session{meta: h.meta}, host, ask)
}

func (m mover) known(ctx context.Context) error { return keptVMs(m).known(ctx) }

// Send implements driver.Mover.
func (m mover) Send(ctx context.Context, vm *pb.VM, host string) error {
	if err := m.known(ctx); err != nil {
		return err
	}
	def, err := m.h.vms.Definition(ctx, vm.Name)
	if err != nil {
		return err
	}
	ask := &pb.ReceiveVMRequest{Vm: def, From: m.h.cfg.Name}
	if ask.Features, err = m.h.vms.Features(ctx); err != nil {
		return err
	}
	for _, name := range def.Disks {
		v, err := m.h.gw.Volume(name)
		if err != nil {
			return err
		}
		ask.Sizes = append(ask.Sizes, v.Size())
	}
	rep, err := to(ctx, m.h, host, func(ctx context.Context, hc pb.HostControlClient) (*pb.ReceiveVMReply, error) {
		return hc.ReceiveVM(ctx, ask)
	})
	if err == nil {
		err = status.New(status.Kind(rep.Status), rep.Detail)
	}
	if err != nil {
		return err
	}
	m.h.moves.begin(vm.Name, def.Disks, rep.Session, host)
	return m.h.vms.Send(ctx, vm.Name, agent.Incoming{Addr: rep.Addr, Token: rep.Token})
}

// Switch implements driver.Mover.
func (m mover) Switch(ctx context.Context, bind *pb.BindVM) error {
	mv, ok := m.h.moves.get(bind.Vm)
	if !ok {
		return status.Errorf(status.Internal, "VM %s is switched and was not sent", bind.Vm)
	}
	return m.h.gw.HandOver(ctx, mv.disks, gateway.Target{Host: bind.Host, Session: mv.session, Bind: bind})
}

// Finish implements driver.Mover.
func (m mover) Finish(ctx context.Context, vm *pb.VM) error {
	if err := m.known(ctx); err != nil {
		return err
	}
	err := m.h.vms.Finish(ctx, vm.Name)
	if err == nil {
		return nil
	}
	if _, gone := m.h.vms.Show(ctx, vm.Name); errors.Is(gone, status.NotFound) {
		return gone
	}
	return err
}

// arriveEvery is between two questions to a host that does not answer.
const arriveEvery = 200 * time.Millisecond

// Arrive implements driver.Mover. A host that is just starting again is asked again.
func (m mover) Arrive(ctx context.Context, vm *pb.VM, host string) error {
	for {
		err := hostDone(to(ctx, m.h, host, func(ctx context.Context, hc pb.HostControlClient) (*pb.HostReply, error) {
			return hc.ArriveVM(ctx, &pb.VMRef{Vm: vm.Name})
		}))
		if k := status.Of(err); k != status.Unavailable && k != status.Shutdown || ctx.Err() != nil {
			return err
		}
		pause(ctx, arriveEvery)
	}
}

// Tell implements driver.Mover.
func (m mover) Tell(ctx context.Context, vm *pb.VM, host string) error {
	ask := &pb.LandVMRequest{Vm: vm, SoFar: &pb.VMMigration{}}
	if g, still, err := m.h.vms.Migration(ctx, vm.Name); err == nil {
		mv, _ := m.h.moves.get(vm.Name)
		ask.SoFar = &pb.VMMigration{SentBytes: g.Sent, TotalBytes: g.Total, TotalUs: us(time.Since(mv.begun)), StillUs: us(time.Since(still))}
	}
	m.h.moves.end(vm.Name)
	return hostDone(to(ctx, m.h, host, func(ctx context.Context, hc pb.HostControlClient) (*pb.HostReply, error) {
		return hc.LandVM(ctx, ask)
	}))
}

// Land implements driver.Mover.
func (m mover) Land(ctx context.Context, vm *pb.VM) (string, error) {
	if err := m.known(ctx); err != nil {
		return "", err
	}
	if err := m.h.vms.Land(ctx, vm.Name); err != nil {
		if errors.Is(err, status.NotFound) { // what there is of it must not be taken for it
			if aerr := m.h.vms.Abandon(ctx, vm.Name); aerr != nil && !errors.Is(aerr, status.NotFound) {
				return "", aerr
			}
		}
		return "", err
	}
	how := m.h.moves.landed(vm.Name)
	go m.h.growLanded(vm.Name)
	return how, nil
}

// growLanded lets a guest see what has grown while it moved.
func (h *hostd) growLanded(name string) {
	ctx, cancel := context.WithTimeout(context.Background(), closeWait)
	defer cancel()
	def, err := h.vms.Definition(ctx, name)
	if err != nil {
		return // it has ended
	}
	for _, d := range def.Disks {
		if v, err := h.gw.Volume(d); err == nil {
			h.resized(d, v.Size())
		}
	}
}

// Abandon implements driver.Mover.
func (m mover) Abandon(ctx context.Context, vm *pb.VM, host string) error {
	m.h.moves.end(vm.Name)
	return hostDone(to(ctx, m.h, host, func(ctx context.Context, hc pb.HostControlClient) (*pb.HostReply, error) {
		return hc.AbandonVM(ctx, &pb.VMRef{Vm: vm.Name})
	}))
}

// GoBack implements driver.Mover.
func (m mover) GoBack(ctx context.Context, vm *pb.VM) error {
	if err := m.known(ctx); err != nil {
		return err
	}
	if err := m.h.vms.GoBack(ctx, vm.Name); err != nil {
		return err
	}
	go m.h.growLanded(vm.Name)
	return nil
}

// listenMemory opens a port on each of this host's storage addresses.
func (h *hostd) listenMemory() (ls []net.Listener, addr string, err error) {
	var addrs []string
	for _, a := range link.SplitAddrs(h.cfg.Data) {
		ip, _, err := net.SplitHostPort(a)
		var l net.Listener
		if err == nil {
			l, err = link.Listen(link.Config{Addr: net.JoinHostPort(ip, "0"), DSCP: h.cfg.Network.DSCP})
		}
		if err != nil {
			for _, l := range ls {
				err = errors.Join(err, l.Close())
			}
			return nil, "", err
		}
		_, port, _ := net.SplitHostPort(l.Addr().String())
		ls, addrs = append(ls, l), append(addrs, net.JoinHostPort(ip, port))
	}
	return ls, strings.Join(addrs, ","), nil
}

// dialMemory reaches a port of listenMemory elsewhere.
func (h *hostd) dialMemory(ctx context.Context, addr string) (net.Conn, error) {
	return link.Dialer{DSCP: h.cfg.Network.DSCP}.Dial(ctx, addr)
}

// Expect implements agent.Volumes.
func (d vmVolumes) Expect(name, from string, size uint64) string {
	d.h.gw.Expect(name, size, func(ctx context.Context, off uint64, p []byte) error {
		for len(p) > 0 {
			n := min(len(p), readMax)
			rep, err := to(ctx, d.h, from, func(ctx context.Context, hc pb.HostControlClient) (*pb.ReadVolumeReply, error) {
				return hc.ReadVolume(ctx, &pb.ReadVolumeRequest{Volume: name, Host: d.h.cfg.Name, Offset: off, Length: uint32(n)})
			})
			if err == nil {
				err = status.New(status.Kind(rep.Status), rep.Detail)
			}
			if err == nil && len(rep.Data) != n {
				err = status.Errorf(status.Corrupt, "host %s answered a read of %d bytes with %d", from, n, len(rep.Data))
			}
			if err != nil {
				return err
			}
			copy(p, rep.Data)
			p, off = p[n:], off+uint64(n)
		}
		return nil
	})
	return d.h.uri(name)
}

// TakeBack implements agent.Volumes.
func (d vmVolumes) TakeBack(ctx context.Context, name string) error {
	v, err := d.h.gw.Attach(ctx, name, true)
	if err == nil {
		err = v.WaitServing(ctx)
	}
	return err
}

// ReceiveVM implements pb.HostControlServer.
func (c *control) ReceiveVM(ctx context.Context, r *pb.ReceiveVMRequest) (*pb.ReceiveVMReply, error) {
	in, err := c.receive(ctx, r)
	if err != nil {
		return &pb.ReceiveVMReply{Status: uint32(status.Of(err)), Detail: err.Error()}, nil
	}
	return &pb.ReceiveVMReply{Addr: in.Addr, Token: in.Token, Session: c.h.gw.Session()}, nil
}

func (c *control) receive(ctx context.Context, r *pb.ReceiveVMRequest) (in agent.Incoming, err error) {
	if err := c.ready(ctx); err != nil {
		return in, err
	}
	vm, err := c.vm(ctx, r.Vm.GetName())
	if err != nil {
		return in, err
	}
	if vm.Host != r.From || vm.GetQueue().GetStep() != state.StepMigrating || vm.Queue.NextHost != c.h.cfg.Name {
		return in, status.Errorf(status.Conflict, "VM %s is not on its way from host %s to host %s", vm.Name, r.From, c.h.cfg.Name)
	}
	mine, err := c.h.vms.Features(ctx)
	if err != nil {
		return in, err
	}
	if mine != r.Features {
		return in, status.Errorf(status.Unsupported, "a machine of host %s (%s) cannot go on on host %s (%s): `cairn vm migrate --cold` moves it by stop and start", r.From, r.Features, c.h.cfg.Name, mine)
	}
	return c.h.vms.Receive(ctx, r.Vm, r.From, r.Sizes)
}

// ArriveVM implements pb.HostControlServer.
func (c *control) ArriveVM(ctx context.Context, r *pb.VMRef) (*pb.HostReply, error) {
	if err := c.ready(ctx); err != nil {
		return reply(err), nil
	}
	return reply(c.h.vms.Arrive(ctx, r.Vm)), nil
}

// LandVM implements pb.HostControlServer.
func (c *control) LandVM(ctx context.Context, r *pb.LandVMRequest) (*pb.HostReply, error) {
	if err := c.ready(ctx); err != nil {
		return reply(err), nil
	}
	c.h.moves.landing(r.Vm.GetName(), r.SoFar)
	return reply(c.h.keeper.Land(ctx, r.Vm)), nil
}

// AbandonVM implements pb.HostControlServer.
func (c *control) AbandonVM(ctx context.Context, r *pb.VMRef) (*pb.HostReply, error) {
	if err := c.ready(ctx); err != nil {
		return reply(err), nil
	}
	return reply(c.h.vms.Abandon(ctx, r.Vm)), nil
}

// LookNow implements pb.HostControlServer.
func (c *control) LookNow(context.Context, *pb.VMRef) (*pb.HostReply, error) {
	c.h.gw.RenewNow()
	return reply(nil), nil
}

// ReadVolume implements pb.HostControlServer: only for the host that the volume's
// VM is on its way to.
func (c *control) ReadVolume(ctx context.Context, r *pb.ReadVolumeRequest) (*pb.ReadVolumeReply, error) {
	rep := &pb.ReadVolumeReply{}
	err := c.comesTo(ctx, r.Volume, r.Host)
	if err == nil && r.Length > readMax {
		err = status.Errorf(status.TooBig, "a read of %d bytes: at most %d", r.Length, readMax)
	}
	if err == nil {
		rep.Data = make([]byte, r.Length)
		err = c.h.gw.ReadAt(ctx, r.Volume, r.Offset, rep.Data)
	}
	if err != nil {
		rep = &pb.ReadVolumeReply{Status: uint32(status.Of(err)), Detail: err.Error()}
	}
	return rep, nil
}

// comesTo says whether a volume's VM is being moved from here to a host.
func (c *control) comesTo(ctx context.Context, volume, host string) error {
	rep, err := c.h.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Vms{Vms: true}})
	if err != nil {
		return err
	}
	for _, vm := range rep.Vms {
		if vm.GetQueue().GetStep() != state.StepMigrating || vm.Host != c.h.cfg.Name || vm.Queue.NextHost != host {
			continue
		}
		for _, d := range append([]string{vm.Volume}, vm.Disks...) {
			if d == volume {
				return nil
			}
		}
	}
	return status.Errorf(status.Permission, "no VM with volume %s is on its way from host %s to host %s", volume, c.h.cfg.Name, host)
}

// HandOverVolume implements pb.HostControlServer.
func (c *control) HandOverVolume(ctx context.Context, r *pb.HandOverVolumeRequest) (*pb.HostReply, error) {
	if err := c.unused(ctx, r.Volume); err != nil {
		return reply(err), nil
	}
	return reply(c.h.gw.HandOver(ctx, []string{r.Volume}, gateway.Target{Host: r.Host, Session: r.Session})), nil
}

// handOver moves a volume that is attached somewhere to a host, which attaches it.
func (s *session) handOver(ctx context.Context, name, host string) error {
	v, err := s.volume(ctx, name)
	if err != nil {
		return err
	}
	if v.HolderSession == "" || v.Maintenance || v.HolderHost == host {
		return nil // attach as always
	}
	st, err := onHost(ctx, s, host, func(ctx context.Context, hc pb.HostControlClient) (*pb.HostStatusReply, error) {
		return hc.HostStatus(ctx, &pb.HostStatusRequest{})
	})
	if err != nil {
		return err
	}
	err = hostDone(onHost(ctx, s, v.HolderHost, func(ctx context.Context, hc pb.HostControlClient) (*pb.HostReply, error) {
		return hc.HandOverVolume(ctx, &pb.HandOverVolumeRequest{Volume: name, Host: host, Session: st.Session})
	}))
	if err != nil {
		return fmt.Errorf("volume %s is not handed over: %w", name, err)
	}
	return nil
}
