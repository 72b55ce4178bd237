package nbd

import (
	"strings"

	"github.com/cairnstore/cairn/proto/status"
)

// Name is what an export's name means: a volume, or one of its snapshots.
//
//	volume             the volume itself, read and written
//	volume@snapshot    what it was at that moment, read only
type Name struct {
	Volume   string
	Snapshot string // "": the volume itself
}

// ParseName reads an export's name. Whether there is such a volume is not its
// business.
func ParseName(s string) (Name, error) {
	volume, snapshot, at := strings.Cut(s, "@")
	switch {
	case len(s) > MaxName:
		return Name{}, status.Errorf(status.TooBig, "an export name of %d bytes is longer than %d", len(s), MaxName)
	case volume == "":
		return Name{}, status.Errorf(status.NotFound, "the export name %q names no volume: write VOLUME or VOLUME@SNAPSHOT", s)
	case at && (snapshot == "" || strings.Contains(snapshot, "@")):
		return Name{}, status.Errorf(status.NotFound, "the export name %q names no snapshot: write VOLUME@SNAPSHOT", s)
	}
	return Name{Volume: volume, Snapshot: snapshot}, nil
}

// String is the name as an export has it.
func (n Name) String() string {
	if n.Snapshot == "" {
		return n.Volume
	}
	return n.Volume + "@" + n.Snapshot
}
