// Package backup keeps copies of volumes outside of the cluster: in a directory,
// or in an S3-compatible store.
//
// Duty: the format, what is written in which order, verifying, restoring, and
// removing without taking what others need. Floor: F3. It knows no cluster: the
// ranges that have changed, a reader of the snapshot and a writer of the new
// volume are given to it.
//
// # Format, version 1 (docs/BACKUP.md)
//
//	cairn-backup                 {"format":"cairn-backup","version":1}
//	data/ab/abcdef…              an object, named by the SHA-256 of its bytes:
//	                             a piece (1 MiB of a volume), or a list (the
//	                             names of a chunk's 64 pieces, 32 bytes each)
//	volumes/NAME/ID              an index: one backup, complete
//	running/NAME/ID              an index that is not complete yet
//	locks/ID                     somebody writes: a backup of one volume, or a
//	                             removal, which nothing else may run beside
//
// An index is JSON and a line with the SHA-256 of it. It names one list for each
// chunk that is not all zeros, and 32 zero bytes in a list name a piece of zeros:
// so each index is whole by itself, and what has not changed is shared.
//
// # Order, and crash points
//
// Pieces are written before the list that names them, lists before the index, and
// each is there whole or not at all. Whatever is cut short leaves objects that no
// index names: the next backup finds and uses them, the next removal takes them
// away. A removal takes the index first, and objects only while no backup runs, or
// waits to be gone on with: what that has written is named by no index yet.
package backup

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

// Version is the format written here; others are refused.
const Version = 1

// Sizes of the format.
const (
	PieceBytes  = 1 << 20
	ChunkPieces = 64
	ChunkBytes  = ChunkPieces * PieceBytes
)

const (
	formatName = "cairn-backup"
	sumLine    = "sha256 "
)

// Bucket is where objects lie. Names are slash-separated and relative.
type Bucket interface {
	// Put makes an object, or replaces it: whole, and durable when it returns.
	Put(ctx context.Context, name string, data []byte) error
	// Get reads an object; status.NotFound if there is none.
	Get(ctx context.Context, name string) ([]byte, error)
	// Has reports whether an object is there.
	Has(ctx context.Context, name string) (bool, error)
	// List calls each with the names that begin with a prefix.
	List(ctx context.Context, prefix string, each func(name string) error) error
	// Remove takes an object away; none there is fine.
	Remove(ctx context.Context, name string) error
	// String names the bucket to people.
	String() string
}

// Index is one backup.
type Index struct {
	Version   int               `json:"version"`
	Volume    string            `json:"volume"` // its name then
	VolumeID  uint64            `json:"volumeId"`
	ID        string            `json:"id"` // of the backup; rises with time
	Snapshot  string            `json:"snapshot"`
	CutUnixNs int64             `json:"cutUnixNs"`
	Base      string            `json:"base,omitempty"` // the backup it was made against
	SizeBytes uint64            `json:"sizeBytes"`
	Written   uint64            `json:"writtenBytes"` // of pieces that were not there yet
	Read      uint64            `json:"readBytes"`    // from the volume
	Chunks    map[uint32]string `json:"chunks"`       // index → name of its list
	Done      map[uint32]bool   `json:"done,omitempty"`
}

// Name is VOLUME@ID.
func (x *Index) Name() string { return x.Volume + "@" + x.ID }

// Created is when its snapshot was taken.
func (x *Index) Created() time.Time { return time.Unix(0, x.CutUnixNs).UTC() }

// Repo is a bucket with backups in it.
type Repo struct{ b Bucket }

// Open opens a repository; create makes one of an empty bucket.
func Open(ctx context.Context, b Bucket, create bool) (*Repo, error) {
	raw, err := b.Get(ctx, formatName)
	if status.Of(err) == status.NotFound {
		if !create {
			return nil, status.Errorf(status.NotFound, "there are no backups in %s: `cairn volume backup VOLUME %s` makes one", b, b)
		}
		some := errors.New("not empty")
		if err := b.List(ctx, "", func(string) error { return some }); errors.Is(err, some) {
			return nil, status.Errorf(status.Exists, "%s holds something else: name an empty place, or one with backups", b)
		} else if err != nil {
			return nil, err
		}
		raw, err = json.Marshal(map[string]any{"format": formatName, "version": Version})
		if err == nil {
			err = b.Put(ctx, formatName, append(raw, '\n'))
		}
	}
	if err != nil {
		return nil, err
	}
	var f struct {
		Format  string
		Version int
	}
	if err := json.Unmarshal(raw, &f); err != nil || f.Format != formatName {
		return nil, status.Errorf(status.Corrupt, "%s/%s is damaged: it does not name a format", b, formatName)
	}
	if f.Version != Version {
		return nil, status.Errorf(status.Unsupported, "the backups in %s are of version %d, this cairn knows %d", b, f.Version, Version)
	}
	return &Repo{b}, nil
}

func nameOf(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func objectPath(name string) string { return "data/" + name[:2] + "/" + name }

// object reads an object and holds it against its name.
func (r *Repo) object(ctx context.Context, name string) ([]byte, error) {
	if len(name) != 2*sha256.Size {
		return nil, status.Errorf(status.Corrupt, "%q is not the name of an object", name)
	}
	data, err := r.b.Get(ctx, objectPath(name))
	switch {
	case status.Of(err) == status.NotFound:
		return nil, status.Errorf(status.Corrupt, "%s/%s is missing", r.b, objectPath(name))
	case err != nil:
		return nil, err
	case nameOf(data) != name:
		return nil, status.Errorf(status.Corrupt, "%s/%s is damaged: its checksum is not its name", r.b, objectPath(name))
	}
	return data, nil
}

// put writes an object unless it is there; fresh: it was not.
func (r *Repo) put(ctx context.Context, data []byte) (name string, fresh bool, err error) {
	name = nameOf(data)
	has, err := r.b.Has(ctx, objectPath(name))
	if err != nil || has {
		return name, false, err
	}
	return name, true, r.b.Put(ctx, objectPath(name), data)
}

func (r *Repo) putIndex(ctx context.Context, where string, x *Index) error {
	raw, err := json.Marshal(x)
	if err != nil {
		return err
	}
	raw = append(raw, '\n')
	return r.b.Put(ctx, where+"/"+x.Volume+"/"+x.ID, append(raw, sumLine+nameOf(raw)+"\n"...))
}

func (r *Repo) getIndex(ctx context.Context, path string) (*Index, error) {
	raw, err := r.b.Get(ctx, path)
	if err != nil {
		return nil, err
	}
	body, sum, ok := bytes.Cut(raw, []byte("\n"))
	body = append(bytes.Clone(body), '\n')
	x := &Index{}
	if !ok || string(sum) != sumLine+nameOf(body)+"\n" || json.Unmarshal(body, x) != nil {
		return nil, status.Errorf(status.Corrupt, "%s/%s is damaged: its checksum does not hold", r.b, path)
	}
	if x.Version != Version {
		return nil, status.Errorf(status.Unsupported, "%s/%s is of version %d, this cairn knows %d", r.b, path, x.Version, Version)
	}
	return x, nil
}

// indexes lists what lies under volumes/ or running/, of one volume or all, by
// volume and time.
func (r *Repo) indexes(ctx context.Context, where, volume string) (out []*Index, err error) {
	prefix := where + "/"
	if volume != "" {
		prefix += volume + "/"
	}
	var names []string
	if err := r.b.List(ctx, prefix, func(n string) error { names = append(names, n); return nil }); err != nil {
		return nil, err
	}
	slices.Sort(names)
	for _, n := range names {
		x, err := r.getIndex(ctx, n)
		if err != nil {
			return nil, err
		}
		out = append(out, x)
	}
	return out, nil
}

// Backups lists complete backups of a volume, or with "" of all, oldest first.
func (r *Repo) Backups(ctx context.Context, volume string) ([]*Index, error) {
	return r.indexes(ctx, "volumes", volume)
}

// Running lists backups that were begun and are not complete.
func (r *Repo) Running(ctx context.Context, volume string) ([]*Index, error) {
	return r.indexes(ctx, "running", volume)
}

// Find reads VOLUME@ID, or the newest of VOLUME.
func (r *Repo) Find(ctx context.Context, name string) (*Index, error) {
	volume, id, _ := strings.Cut(name, "@")
	if id == "" {
		all, err := r.Backups(ctx, volume)
		if err != nil {
			return nil, err
		}
		if len(all) == 0 || volume == "" {
			return nil, status.Errorf(status.NotFound, "%s has no backup of volume %q: `cairn volume backup ls %s` lists them", r.b, volume, r.b)
		}
		return all[len(all)-1], nil
	}
	x, err := r.getIndex(ctx, "volumes/"+volume+"/"+id)
	if status.Of(err) == status.NotFound {
		return nil, status.Errorf(status.NotFound, "%s has no backup %s: `cairn volume backup ls %s` lists them", r.b, name, r.b)
	}
	return x, err
}

// list reads the names of a chunk's pieces; a name of zeros is a piece of zeros.
func (r *Repo) list(ctx context.Context, x *Index, chunk uint32) ([]string, error) {
	names := make([]string, ChunkPieces)
	if x == nil || x.Chunks[chunk] == "" {
		return names, nil
	}
	raw, err := r.object(ctx, x.Chunks[chunk])
	if err != nil {
		return nil, err
	}
	if len(raw) != ChunkPieces*sha256.Size {
		return nil, status.Errorf(status.Corrupt, "%s/%s is no list of pieces", r.b, objectPath(x.Chunks[chunk]))
	}
	for i := range names {
		if p := raw[i*sha256.Size : (i+1)*sha256.Size]; !bytes.Equal(p, make([]byte, sha256.Size)) {
			names[i] = hex.EncodeToString(p)
		}
	}
	return names, nil
}

// putList writes the names of a chunk's pieces; "" if all are zeros.
func (r *Repo) putList(ctx context.Context, names []string) (string, error) {
	raw := make([]byte, ChunkPieces*sha256.Size)
	for i, n := range names {
		if n != "" {
			if _, err := hex.Decode(raw[i*sha256.Size:], []byte(n)); err != nil {
				return "", fmt.Errorf("an object cannot be named %q: %w", n, err)
			}
		}
	}
	if bytes.Equal(raw, make([]byte, len(raw))) {
		return "", nil
	}
	name, _, err := r.put(ctx, raw)
	return name, err
}
