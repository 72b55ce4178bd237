package main

import (
	"context"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/wire"
)

// answers is a wire.Sink that hands replies to a channel with room for them.
type answers chan *wire.Reply

// Replies implements wire.Sink.
func (a answers) Replies(rs []*wire.Reply) {
	for _, r := range rs {
		a <- r
	}
}

// sweepStore drops, from one store, the volumes that metadata says are gone.
func sweepStore(ctx context.Context, meta querier, s *hostStore) error {
	held := s.Volumes()
	if len(held) == 0 {
		return nil
	}
	ask := &pb.GoneVolumes{}
	for id := range held {
		ask.VolumeIds = append(ask.VolumeIds, uint64(id))
	}
	rep, err := meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Gone{Gone: ask}})
	if err != nil || len(rep.Gone) == 0 {
		return err
	}
	var reqs []*wire.Request
	for _, id := range rep.Gone {
		reqs = append(reqs, &wire.Request{Kind: wire.Drop, Volume: ids.VolumeID(id)})
	}
	return drop(ctx, s, reqs)
}

// drop has a store forget volumes, chunks or layers.
func drop(ctx context.Context, s *hostStore, reqs []*wire.Request) (err error) {
	got := make(answers, len(reqs))
	for i, q := range reqs {
		q.ID, q.Store, q.Epoch = uint64(i), s.ID(), ids.MaxEpoch
	}
	s.Submit(reqs, got)
	for range reqs {
		select {
		case r := <-got:
			if e := r.Err(); e != nil && err == nil {
				err = e
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return err
}

// sweepLayers tells one store which layers its volumes have: it drops the others.
func sweepLayers(ctx context.Context, meta querier, s *hostStore) error {
	ask := &pb.LayersOf{}
	for id := range s.Volumes() {
		ask.VolumeIds = append(ask.VolumeIds, uint64(id))
	}
	if len(ask.VolumeIds) == 0 {
		return nil
	}
	rep, err := meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_LayersOf{LayersOf: ask}})
	if err != nil || len(rep.Layers) == 0 {
		return err
	}
	var reqs []*wire.Request
	for _, v := range rep.Layers {
		reqs = append(reqs, &wire.Request{Kind: wire.Layers, Volume: ids.VolumeID(v.VolumeId), Layer: ids.LayerID(v.Last), Entries: volume.LayerEntries(v)})
	}
	return drop(ctx, s, reqs)
}

// sweepWaste drops, from one store, copies of chunks that no map names any
// more, and says so.
func sweepWaste(ctx context.Context, meta metadata, s *hostStore) error {
	id := s.ID()
	for {
		rep, err := meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Waste{Waste: id[:]}})
		if err != nil || len(rep.Waste) == 0 {
			return err
		}
		var reqs []*wire.Request
		for _, c := range rep.Waste {
			reqs = append(reqs, &wire.Request{Kind: wire.Drop, Volume: ids.VolumeID(c.VolumeId), Chunk: ids.ChunkID(c.ChunkId)})
		}
		if err := drop(ctx, s, reqs); err != nil {
			return err
		}
		done := &pb.DroppedCopies{Store: id[:], Copies: rep.Waste}
		if _, err := meta.Do(ctx, &pb.Command{Op: &pb.Command_DroppedCopies{DroppedCopies: done}}); err != nil {
			return err
		}
	}
}

// metadata is what a sweep needs of the metadata client.
type metadata interface {
	querier
	Do(ctx context.Context, cmd *pb.Command) (*pb.Result, error)
}

// querier is the reading half of the metadata client.
type querier interface {
	Query(ctx context.Context, q *pb.QueryRequest) (*pb.QueryReply, error)
}
