#!/bin/bash
# Brings qudata-agent to this server: fetches the package, makes sure that it is the one that was released, and hands over
# to `qudata-agent install`, which says what it changes and how to take it back.
#
#   curl -fsSL URL/install.sh | sudo bash -s -- ak-KEY [options of `qudata-agent install`]
#   sudo bash install.sh --from qudata-agent_VERSION_amd64.deb [--unsigned] ak-KEY [options of `qudata-agent install`]
#
# --from takes SHA256SUMS and SHA256SUMS.sig from beside the package; --unsigned does without them. QUDATA_RELEASE_URL
# names another place to fetch from (https, file, or http on this machine).
# A key among the words of a command is seen by every user of this server while it runs, and kept by sudo's log and the
# shell's history. --api-key-file FILE shows it to nobody; nor does QUDATA_API_KEY, exported in a root shell.
# The braces make bash read all of this before it does any of it: half a download does nothing.
{
set -euo pipefail
umask 077
export PATH=/usr/sbin:/usr/bin:/sbin:/bin

PUBLIC_KEY='@PUBLIC_KEY@'
RELEASE_URL=${QUDATA_RELEASE_URL:-'@RELEASE_URL@'}
AGAIN='run the same line again.'
ROOM='make room on that file system (df -h /var/lib).'

# fail CODE SENTENCE NEXT
fail() {
    printf 'install.sh: [%s] %s Next: %s\n' "$1" "$2" "$3" >&2
    exit 1
}

# What the last program said, as the end of a sentence.
said() {
    local words; words=$(tail -c 300 "$work/said" | tr -s '\n' ' ')
    printf '%s' "${words:+ (${words% })}"
}

# A folder that is root's alone, in one where nobody else can put anything and from where programs can be run.
make_private_folder() {
    # The lock is that folder itself, so that none is left behind. Whoever waits for the end of `install` keeps it.
    exec 8</var/lib
    flock -n 8 || fail busy 'Another installation of qudata-agent runs on this server.' 'wait until it has ended.'
    # Of installations that lost their power.
    rm -rf -- /var/lib/qudata-install.*
    work=$(mktemp -d /var/lib/qudata-install.XXXXXXXXXX) || fail no_space 'No folder can be made in /var/lib.' "$ROOM"
    trap 'trap "" INT TERM HUP; rm -rf -- "$work"' EXIT
    : >"$work/said"
}

check_url() {
    local here='^http://(127\.[0-9]+\.[0-9]+\.[0-9]+|localhost|\[::1\])(:[0-9]+)?(/|$)'
    [ -n "$RELEASE_URL" ] || fail bad_url 'This script was made without the address of a release.' \
        'set QUDATA_RELEASE_URL, or download the release and give --from FILE.'
    [[ $RELEASE_URL =~ ^(https://[^/]|file:///) || $RELEASE_URL =~ $here ]] ||
        fail bad_url 'QUDATA_RELEASE_URL must begin with https:// or file:///; http:// is for addresses of this machine only.' \
            'set it to the https address of the release.'
    RELEASE_URL=${RELEASE_URL%/}
}

# fetch NAME MOST_BYTES: from the release into the private folder.
fetch() {
    local url=$RELEASE_URL/$1 to=$work/$1 code=0 how=(--silent)
    [ ! -t 2 ] || how=(--progress-bar)
    if [[ $url == file://* ]]; then
        cp -- "${url#file://}" "$to" 2>"$work/said" || code=22
    elif command -v curl >/dev/null; then
        if [[ $url == https://* ]]; then how+=(--proto '=https'); else how+=(--noproxy '*'); fi
        curl --fail "${how[@]}" --location --proto-redir '=https' --connect-timeout 20 --speed-time 60 --speed-limit 1000 \
            --retry 2 --retry-delay 1 --retry-connrefused --max-filesize "$2" --output "$to" --write-out '%{errormsg}' \
            -- "$url" >"$work/said" || code=$?
    elif command -v wget >/dev/null; then
        if [[ $url == https://* ]]; then how=(--https-only); else how=(--no-proxy); fi
        wget --no-verbose "${how[@]}" --tries=3 --timeout=60 --output-document="$to" -- "$url" 2>"$work/said" || code=$((100 + $?))
    else
        fail missing_tool 'There is neither curl nor wget.' "apt-get install curl, then $AGAIN"
    fi
    case $code in
        0) ;;
        18) fail download_truncated "The download of $1 ended before all of it was here.$(said)" "$AGAIN" ;;
        23 | 103) fail no_space "$1 cannot be written to /var/lib.$(said)" "$ROOM" ;;
        5 | 6 | 7 | 28 | 35 | 52 | 56 | 104) fail mirror_down "The release server does not answer.$(said)" \
            "check network and proxy (https_proxy) of this server, then $AGAIN" ;;
        *) fail download_failed "$1 cannot be had from ${RELEASE_URL/\/\/*@/\/\/}.$(said)" "check that address, then $AGAIN" ;;
    esac
}

# take FILE: from the owner's folder into the private one. What is checked later is the copy, which nobody can change.
take() {
    local files=("$1")
    package=$(basename -- "$1")
    [[ $package =~ ^qudata-agent_[0-9A-Za-z.+~]+_amd64\.deb$ ]] ||
        fail bad_option "--from $1 is not named like a package of qudata-agent." 'give the .deb under the name it was released with.'
    [ "$signed" = no ] || files+=("$(dirname -- "$1")/SHA256SUMS" "$(dirname -- "$1")/SHA256SUMS.sig")
    cp -- "${files[@]}" "$work/" 2>"$work/said" ||
        fail download_failed "Not all files are there.$(said)" 'put the package, SHA256SUMS and SHA256SUMS.sig into one folder, or say --unsigned.'
}

# Only what the holder of the release key has signed is trusted from here on.
check_signature() {
    command -v openssl >/dev/null || fail missing_tool 'There is no openssl to check the signature with.' "apt-get install openssl, then $AGAIN"
    printf '%s\n' "$PUBLIC_KEY" >"$work/key.pem"
    openssl pkeyutl -verify -pubin -inkey "$work/key.pem" -rawin -in "$work/SHA256SUMS" -sigfile "$work/SHA256SUMS.sig" >"$work/said" 2>&1 ||
        fail bad_signature 'The signature of this release is not by the key in this script: nothing of it was run.' \
            'fetch install.sh again from where qudata publishes it; if that does not help, tell qudata.'
}

# Name of the package that SHA256SUMS lists, of which there must be one.
listed_package() {
    sed -nE 's/^[0-9a-f]{64} [ *](qudata-agent_[0-9A-Za-z.+~]+_amd64\.deb)$/\1/p' "$work/SHA256SUMS" >"$work/names"
    [ "$(wc -l <"$work/names")" = 1 ] || fail bad_release 'SHA256SUMS does not list one package for amd64.' 'tell qudata.'
    package=$(cat "$work/names")
}

check_sum() {
    (cd "$work" && awk -v name="$package" '$2 == name || $2 == "*" name' SHA256SUMS | sha256sum --check --strict --status) ||
        fail bad_checksum "$package is not what was released: its SHA-256 is not the one in SHA256SUMS." "$AGAIN"
}

main() {
    # Nothing from here on may eat the script, which comes in by standard input, or wait there for a person.
    exec </dev/null
    local from='' words=()
    while (($#)); do
        case $1 in
            ak-*) export QUDATA_API_KEY=$1 ;;
            --from) from=${2:-} && shift ;;
            --from=*) from=${1#--from=} ;;
            --unsigned) signed=no ;;
            *) words+=("$1") ;;
        esac
        shift || fail bad_option '--from needs a file.' 'give --from FILE.'
    done
    [ "$signed" = yes ] || [ -n "$from" ] || fail bad_option '--unsigned is for a file of your own.' 'give --from FILE with it, or leave it out.'
    ((EUID == 0)) || fail not_root 'This needs root.' 'put sudo before bash.'
    [ "$(dpkg --print-architecture 2>/dev/null || uname -m)" = amd64 ] || fail unsupported_distribution 'This is not Debian or Ubuntu on an x86-64 processor.' \
        'use a server with Debian 12 or 13, or Ubuntu 22.04 or 24.04.'
    make_private_folder
    if [ -n "$from" ]; then take "$from"; else check_url && fetch SHA256SUMS 65536 && fetch SHA256SUMS.sig 4096; fi
    [ "$signed" = no ] || check_signature
    [ -n "$from" ] || { listed_package && fetch "$package" 536870912; }
    if [ "$signed" = yes ]; then check_sum; else printf 'install.sh: nobody has checked who made %s, as --unsigned says.\n' "$package" >&2; fi
    dpkg-deb --extract "$work/$package" "$work/root" >"$work/said" 2>&1 || fail bad_release "$package cannot be unpacked.$(said)" "$ROOM"
    # Another shell, because the words of this one may hold the key. It waits, whatever signal comes, and cleans up;
    # so does its rm, for a restart of the server ends the whole session at once.
    trap - EXIT
    umask 022
    unset QUDATA_RELEASE_URL
    # shellcheck disable=SC2016 # these are for that shell to expand
    exec bash -c 'trap "trap \"\" INT TERM HUP; rm -rf -- \"\$0\"" EXIT; trap : INT TERM HUP; "$0/root/usr/bin/qudata-agent" install --package "$0/$1" "${@:2}" 8<&-' \
        "$work" "$package" "${words[@]}"
}

package='' signed=yes
main "$@"
}
