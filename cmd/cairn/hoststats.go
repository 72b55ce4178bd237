package main

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/nbd"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// VolumeStats implements pb.HostControlServer.
func (c *control) VolumeStats(_ context.Context, r *pb.VolumeRef) (*pb.VolumeStatsReply, error) {
	if _, err := c.h.gw.Volume(r.Volume); err != nil {
		return &pb.VolumeStatsReply{Status: uint32(status.Of(err)), Detail: err.Error()}, nil
	}
	x := c.h.nbd.Stats(r.Volume)
	rep := &pb.VolumeStatsReply{Connections: uint32(x.Connections), InFlight: uint64(x.InFlight), InFlightBytes: uint64(x.InFlightBytes)}
	for class := range nbd.ClassCount {
		o := &x.Ops[class]
		if o.Done == 0 {
			continue
		}
		l := &o.Latency
		p := &pb.OpStats{Op: class.String(), Done: o.Done, Failed: o.Failed, Bytes: o.Bytes, SumUs: l.SumUs, MaxUs: l.MaxUs,
			P50Us: l.QuantileUs(0.5), P99Us: l.QuantileUs(0.99), P999Us: l.QuantileUs(0.999)}
		for i, n := range l.Counts {
			if n > 0 {
				p.Buckets = append(p.Buckets, &pb.LatencyBucket{MaxUs: nbd.BucketMaxUs(i), Count: n})
			}
		}
		rep.Ops = append(rep.Ops, p)
	}
	return rep, nil
}

var opNames = map[volume.OpKind]string{volume.OpRead: "read", volume.OpWrite: "write", volume.OpZero: "zero", volume.OpTrim: "trim", volume.OpFlush: "flush"}

// SlowRequests implements pb.HostControlServer.
func (c *control) SlowRequests(_ context.Context, r *pb.VolumeRef) (*pb.SlowRequestsReply, error) {
	v, err := c.h.gw.Volume(r.Volume)
	if err != nil {
		return &pb.SlowRequestsReply{Status: uint32(status.Of(err)), Detail: err.Error()}, nil
	}
	// The engine's clock also counts suspension; what it says is turned into
	// the time of day here.
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return nil, err
	}
	zero := time.Now().Add(-time.Duration(ts.Nano()))
	members := v.Info().Replicas
	rep := &pb.SlowRequestsReply{}
	for _, s := range v.Slowest() {
		q := &pb.SlowRequest{Op: opNames[s.Kind], Fua: s.FUA, Offset: s.Off, Length: s.Len, Status: uint32(s.Status), EndedUnixNs: zero.Add(s.Ended).UnixNano(),
			TotalUs: us(s.Total), QueueUs: us(s.Waited), BeforeUs: us(s.Before), AfterUs: us(s.After)}
		for _, l := range s.Legs {
			g := &pb.SlowLeg{Answered: l.Answered, TimeUs: us(l.Time), StoreUs: us(l.Store)}
			if l.Replica < len(members) {
				m := members[l.Replica]
				g.Host, g.Store = m.Host, m.Store[:]
			}
			q.Legs = append(q.Legs, g)
		}
		rep.Requests = append(rep.Requests, q)
	}
	return rep, nil
}

// tellErrors puts into the event log that users of a volume were answered with an
// error: at once, and then not again for erredFor.
func (h *hostd) tellErrors(ctx context.Context) {
	const look = time.Second
	type seen struct {
		errors uint64
		told   time.Time
	}
	last := map[string]seen{}
	for pause(ctx, look); ctx.Err() == nil; pause(ctx, look) {
		now := map[string]seen{} // those of volumes that are attached no more are forgotten
		for _, v := range h.gw.Volumes() {
			x, l := h.nbd.Stats(v.Name()), last[v.Name()]
			if x.Errors > l.errors && time.Since(l.told) > erredFor {
				what := fmt.Sprintf("volume %s: a request of its users was answered with an error: %v", v.Name(), x.Error)
				if _, err := h.meta.Do(ctx, &pb.Command{Op: &pb.Command_Note{Note: &pb.Note{What: what}}}); err != nil {
					h.log.Warn("not in the event log yet", "what", what, "err", err)
					x.Errors = l.errors // again at the next look
				} else {
					l.told = time.Now()
				}
			}
			now[v.Name()] = seen{x.Errors, l.told}
		}
		last = now
	}
}

func us(d time.Duration) uint64 { return uint64(max(d.Microseconds(), 0)) }
