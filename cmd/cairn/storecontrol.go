package main

import (
	"context"
	"slices"
	"strings"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// shownBad bounds the bad blocks in one answer.
const shownBad = 1000

// store finds a store of this host.
func (c *control) store(id []byte) (*hostStore, error) {
	want, err := ids.StoreIDFromBytes(id)
	if err != nil {
		return nil, status.Errorf(status.Invalid, "%w", err)
	}
	for _, s := range c.h.stores {
		if s.ID() == want {
			return s, nil
		}
	}
	return nil, status.Errorf(status.NotFound, "host %s has no store %s open: its log says why, if its configuration names it", c.h.cfg.Name, want.Short())
}

// ShowStore implements pb.HostControlServer.
func (c *control) ShowStore(_ context.Context, r *pb.StoreRef) (*pb.StoreReply, error) {
	s, err := c.store(r.Store)
	if err != nil {
		return &pb.StoreReply{Status: uint32(status.Of(err)), Detail: err.Error()}, nil
	}
	id, u, sc := s.ID(), s.Usage(), s.ScrubStatus()
	s.mu.Lock()
	kept := s.scrub
	s.mu.Unlock()
	rep := &pb.StoreReply{Store: id[:], Path: s.path, Kind: s.kind, Incarnation: uint64(s.Incarnation()), Life: uint64(s.Position().Life), Note: u.Note,
		SizeBytes: uint64(s.disk.Size()),
		Usage:     &pb.StoreUsage{Store: id[:], CapacityBytes: u.CapacityBytes, UsedBytes: u.UsedBytes, LiveBytes: u.LiveBytes, State: u.State},
		Scrub: &pb.ScrubState{Running: sc.Running, Segment: sc.Segment, Segments: sc.Segments, ReadBytes: sc.ReadBytes, Blocks: sc.Blocks, BadBlocks: sc.BadBlocks,
			BadHeads: sc.BadHeads, Unrescued: sc.Unrescued, Superblocks: sc.Repaired, StartedUnixNs: kept.Started, FinishedUnixNs: kept.Finished, BytesPerSecond: uint64(kept.Pace)}}
	bad := s.BadBlocks()
	for _, b := range bad[:min(len(bad), shownBad)] {
		rep.Bad = append(rep.Bad, &pb.BadBlock{VolumeId: uint64(b.Volume), ChunkId: uint64(b.Chunk), Layer: uint32(b.Layer), Block: uint32(b.Block), Version: uint64(b.Version)})
	}
	for v, n := range s.Volumes() {
		rep.Volumes = append(rep.Volumes, &pb.VolumeUsage{VolumeId: uint64(v), LiveBytes: n})
	}
	slices.SortFunc(rep.Volumes, func(a, b *pb.VolumeUsage) int { return int(int64(a.VolumeId) - int64(b.VolumeId)) })
	return rep, nil
}

// ScrubStore implements pb.HostControlServer.
func (c *control) ScrubStore(_ context.Context, r *pb.ScrubStoreRequest) (*pb.HostReply, error) {
	s, err := c.store(r.Store)
	if err == nil && strings.HasPrefix(s.Usage().State, "failed") {
		err = status.Errorf(status.IO, "the store has stopped (%s): it cannot be read any more", s.Usage().State)
	}
	if err == nil {
		err = s.startScrub(0, int64(min(r.BytesPerSecond, 1<<40)))
	}
	if err == nil {
		err = s.saveScrub()
	}
	return reply(err), nil
}
