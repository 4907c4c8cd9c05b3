#!/usr/bin/env bash
# Give a Debian 12 machine an unprivileged Apptainer. Run as root; run it again and it changes nothing.
#
# Debian 12 has no apptainer package, and that of Debian sid needs a newer glibc. So sid's package is unpacked under
# PREFIX beside a glibc of its own, which its two programs are patched to load; Apptainer finds its configuration
# relative to itself. The host's own packages stay as they are, and paths, users and mounts are the host's.
#
# Root may not build images here: containers on CI machines lack capabilities that Apptainer asks for as root, and
# nobody is root on a cluster. So the command `apptainer` runs as APPTAINER_USER where root calls it.
set -euo pipefail

PREFIX=${PREFIX:-/opt/apptainer}
APPTAINER_USER=${APPTAINER_USER:-hpc}
COMMAND=${COMMAND:-/usr/local/bin/apptainer}
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
# What Apptainer calls (squashfs, fuse, newuidmap, debootstrap), what patches it, and libsqlite3, which it loads.
HELPERS=(squashfs-tools squashfuse fuse-overlayfs fuse3 uidmap debootstrap patchelf ca-certificates libsqlite3-0)
export DEBIAN_FRONTEND=noninteractive

fail() {
    echo "setup-apptainer: $1" >&2
    exit 1
}

# The Debian mirror that this machine's apt uses, whichever way its sources are written.
debian_mirror() {
    apt-get indextargets --format "\$(REPO_URI)" "Created-By: Packages" "Label: Debian" "Component: main" | head -n 1
}

install_helpers() {
    if ! dpkg --status "${HELPERS[@]}" >/dev/null 2>&1 || [[ -z $(debian_mirror) ]]; then
        apt-get -q update >/dev/null
        apt-get -q -y install --no-install-recommends "${HELPERS[@]}" >/dev/null
    fi
}

# Download sid's packages into the folder $1, by an apt with lists of its own: signatures are checked, and what the
# host's apt knows is not touched. A frozen mirror's Release file may have expired.
download_packages() {
    mkdir -p "$1"/lists/partial "$1"/cache/archives/partial
    echo "deb [signed-by=$KEYRING] $2 sid main" >"$1/sid.list"
    local apt=(apt-get -q -o "Dir::Etc::sourcelist=$1/sid.list" -o Dir::Etc::sourceparts=/dev/null
        -o "Dir::State::lists=$1/lists" -o "Dir::Cache=$1/cache" -o Acquire::Check-Valid-Until=false
        -o Acquire::Languages=none -o APT::Sandbox::User=root)
    "${apt[@]}" update >/dev/null
    (cd "$1" && "${apt[@]}" download apptainer libc6 libseccomp2 >/dev/null)
    local package
    for package in apptainer libc6 libseccomp2; do
        dpkg-deb --extract "$1/${package}"_*.deb "$1/$package"
    done
}

# Lay the packages in $1 out under PREFIX; the new tree appears whole or not at all.
unpack() {
    local new=$PREFIX.new libraries link program interpreter
    libraries=usr/lib/$(uname -m)-linux-gnu
    rm -rf "$new"
    mkdir -p "$new/glibc"
    cp -a "$1/apptainer/." "$new/"
    cp -a "$1/libc6/$libraries"/*.so* "$1/libseccomp2/$libraries"/*.so* "/$libraries"/libsqlite3.so.0* "$new/glibc/"
    # The command looks for etc and var beside its bin, the starter beside its lib.
    for link in usr usr/lib; do
        ln -s "$PREFIX/etc" "$new/$link/etc"
        ln -s "$PREFIX/var" "$new/$link/var"
    done
    for program in usr/bin/apptainer "$libraries/apptainer/bin/starter"; do
        interpreter=$PREFIX/glibc/$(basename "$(patchelf --print-interpreter "$new/$program")")
        patchelf --set-interpreter "$interpreter" --force-rpath --set-rpath "$PREFIX/glibc" "$new/$program"
    done
    chmod 755 "$new"
    rm -rf "$PREFIX"
    mv "$new" "$PREFIX"
}

# An ordinary user with subordinate ids, without which nothing can be owned by root inside an image, and with fuse.
prepare_user() {
    id "$APPTAINER_USER" >/dev/null 2>&1 || useradd --create-home --shell /bin/bash "$APPTAINER_USER"
    local table
    for table in /etc/subuid /etc/subgid; do
        grep -q "^$APPTAINER_USER:" "$table" 2>/dev/null || echo "$APPTAINER_USER:100000:65536" >>"$table"
    done
    [[ -c /dev/fuse ]] || mknod /dev/fuse c 10 229
    chmod 666 /dev/fuse
}

write_command() {
    cat >"$COMMAND" <<COMMAND_TEXT
#!/usr/bin/env bash
# Written by setup-apptainer.sh. Root runs it as \$APPTAINER_USER (default $APPTAINER_USER), others as themselves.
if [[ \$(id -u) == 0 ]]; then
    user=\${APPTAINER_USER:-$APPTAINER_USER}
    USER=\$user LOGNAME=\$user HOME=\$(getent passwd "\$user" | cut -d: -f6)
    export USER LOGNAME HOME
    exec setpriv --reuid "\$user" --regid "\$(id -g "\$user")" --init-groups "$PREFIX/usr/bin/apptainer" "\$@"
fi
exec "$PREFIX/usr/bin/apptainer" "\$@"
COMMAND_TEXT
    chmod 755 "$COMMAND"
}

main() {
    [[ $(id -u) == 0 ]] || fail "needs root; on a cluster, ask for the module or package 'apptainer' instead"
    [[ -r $KEYRING ]] || fail "$KEYRING is missing; run it on Debian"
    install_helpers
    if [[ ! -x $PREFIX/usr/bin/apptainer ]]; then
        local mirror
        mirror=$(debian_mirror)
        [[ -n $mirror ]] || fail "apt knows no Debian mirror; add one to /etc/apt/sources.list.d and run apt-get update"
        work=$(mktemp -d)
        trap 'rm -rf "$work"' EXIT
        download_packages "$work" "$mirror"
        unpack "$work"
    fi
    prepare_user
    write_command
    "$COMMAND" version
}

main
